// The file that is shared: one JSON object, which `make import FILE=` reads.

import Foundation

struct Device: Encodable, Sendable {
    let machine: String
    let system: String
    let build: String
    let cores: Int
    let memoryBytes: UInt64
    let simulator: Bool

    init(system: String) {
        self.system = system
        build = ProcessInfo.processInfo.operatingSystemVersionString
        cores = ProcessInfo.processInfo.activeProcessorCount
        memoryBytes = ProcessInfo.processInfo.physicalMemory
        machine = Device.identifier()
        #if targetEnvironment(simulator)
            simulator = true
        #else
            simulator = false
        #endif
    }

    /// The model identifier, such as iPhone16,2.
    private static func identifier() -> String {
        var size = 0
        sysctlbyname("hw.machine", nil, &size, nil, 0)
        var bytes = [CChar](repeating: 0, count: max(size, 1))
        sysctlbyname("hw.machine", &bytes, &size, nil, 0)
        return String(cString: bytes)
    }
}

struct ResultFile: Encodable {
    let format = "edgeline-iphone-result"
    let version = 1
    let created = Date().formatted(.iso8601)
    let bundleKey: String
    let device: Device
    let plan: Plan
    let units: [UnitResult]

    func write() throws -> URL {
        let encoder = JSONEncoder()
        encoder.keyEncodingStrategy = .convertToSnakeCase
        encoder.outputFormatting = [.sortedKeys]
        let stamp = created.filter { $0.isNumber }
        let name = "edgeline-\(device.machine)-\(stamp).json"
        let url = FileManager.default.temporaryDirectory.appendingPathComponent(name)
        try encoder.encode(self).write(to: url, options: .atomic)
        return url
    }
}
