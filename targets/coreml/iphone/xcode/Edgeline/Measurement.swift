// Timing of the package on one set of compute units, with the conditions of the phone.

import CoreML
import Foundation

enum ComputeUnit: String, CaseIterable, Sendable {
    case all = "ALL"
    case cpuOnly = "CPU_ONLY"
    case cpuAndGPU = "CPU_AND_GPU"
    case cpuAndNeuralEngine = "CPU_AND_NE"

    var coreML: MLComputeUnits {
        switch self {
        case .all: return .all
        case .cpuOnly: return .cpuOnly
        case .cpuAndGPU: return .cpuAndGPU
        case .cpuAndNeuralEngine: return .cpuAndNeuralEngine
        }
    }
}

/// Stopping rule: at least `minQueries` and `minSeconds` in timed queries, at most `maxSeconds`.
struct Plan: Codable, Sendable {
    let warmup: Int
    let minQueries: Int
    let minSeconds: Double
    let maxSeconds: Double

    func isFinished(queries: Int, nanoseconds: Int) -> Bool {
        let seconds = Double(nanoseconds) / 1e9
        return (queries >= minQueries && seconds >= minSeconds) || seconds >= maxSeconds
    }
}

struct Thermal: Encodable, Sendable {
    let before: String
    var after: String
    var worst: String
}

struct LowPowerMode: Encodable, Sendable {
    let before: Bool
    var after: Bool
}

/// The result on one set of compute units; `error` is Core ML's reason where it does not run the package there.
struct UnitResult: Encodable, Sendable {
    let unit: String
    var error: String?
    var loadNs: Int?
    var firstNs: Int?
    var samplesNs: [Int] = []
    var thermal: Thermal
    var lowPowerMode: LowPowerMode
    var agreement: Agreement?
    var leftForeground = false

    var summary: String {
        guard error == nil, !samplesNs.isEmpty else { return "\(unit): \(error ?? "no query")" }
        let median = Double(samplesNs.sorted()[(samplesNs.count - 1) / 2]) / 1e6
        return "\(unit): \(String(format: "%.3f", median)) ms over \(samplesNs.count) queries"
    }
}

/// Load the package, compare its logits on the sample, warm up, and time one query at a time.
func measured(_ unit: ComputeUnit, with sample: Sample) -> UnitResult {
    var worst = ProcessInfo.processInfo.thermalState
    let lowPower = ProcessInfo.processInfo.isLowPowerModeEnabled
    var result = UnitResult(
        unit: unit.rawValue,
        thermal: Thermal(before: name(of: worst), after: name(of: worst), worst: name(of: worst)),
        lowPowerMode: LowPowerMode(before: lowPower, after: lowPower)
    )
    do {
        let (model, loadNs) = try timed { try load(unit) }
        result.loadNs = loadNs
        let queries = try sample.queries()
        result.firstNs = try timed { try model.prediction(from: queries[0]) }.nanoseconds
        result.agreement = try sample.agreement(of: model, on: queries)
        for _ in 0..<sample.plan.warmup {
            try autoreleasepool { _ = try model.prediction(from: queries[0]) }
        }
        var total = 0
        while !sample.plan.isFinished(queries: result.samplesNs.count, nanoseconds: total) {
            let nanoseconds = try autoreleasepool {
                try timed { try model.prediction(from: queries[0]) }.nanoseconds
            }
            result.samplesNs.append(nanoseconds)
            total += nanoseconds
            let state = ProcessInfo.processInfo.thermalState
            if state.rawValue > worst.rawValue { worst = state }
        }
    } catch {
        result.error = String(error.localizedDescription.prefix(200))
    }
    result.thermal.after = name(of: ProcessInfo.processInfo.thermalState)
    result.thermal.worst = name(of: worst)
    result.lowPowerMode.after = ProcessInfo.processInfo.isLowPowerModeEnabled
    return result
}

/// Load the package with hints for fixed shapes and fast predictions.
private func load(_ unit: ComputeUnit) throws -> MLModel {
    guard let url = Bundle.main.url(forResource: "model", withExtension: "mlmodelc") else {
        throw Failure("the app has no compiled model: build it again from the whole folder")
    }
    let configuration = MLModelConfiguration()
    configuration.computeUnits = unit.coreML
    if #available(iOS 17.4, *) {
        configuration.optimizationHints.reshapeFrequency = .infrequent
    }
    if #available(iOS 18.0, *) {
        configuration.optimizationHints.specializationStrategy = .fastPrediction
    }
    return try MLModel(contentsOf: url, configuration: configuration)
}

/// Run `work` and return its value with the elapsed time, by a monotonic clock.
private func timed<Value>(_ work: () throws -> Value) rethrows -> (value: Value, nanoseconds: Int) {
    let clock = ContinuousClock()
    let start = clock.now
    let value = try work()
    let (seconds, attoseconds) = start.duration(to: clock.now).components
    return (value, Int(seconds) * 1_000_000_000 + Int(attoseconds / 1_000_000_000))
}

private func name(of state: ProcessInfo.ThermalState) -> String {
    switch state {
    case .nominal: return "nominal"
    case .fair: return "fair"
    case .serious: return "serious"
    case .critical: return "critical"
    @unknown default: return "unknown"
    }
}

struct Failure: LocalizedError {
    let errorDescription: String?

    init(_ description: String) {
        errorDescription = description
    }
}
