// The window of the app: one button that times the package on every set of compute units, and one that shares the result.

import SwiftUI
import UIKit

@main
struct EdgelineApp: App {
    var body: some Scene {
        WindowGroup { MeasurementView() }
    }
}

struct MeasurementView: View {
    @StateObject private var session = Session()
    @Environment(\.scenePhase) private var scenePhase

    var body: some View {
        NavigationStack {
            List {
                Section(session.title) {
                    Button(session.isRunning ? "Measuring" : "Measure") {
                        Task { await session.measure() }
                    }
                    .disabled(session.isRunning)
                    if let file = session.file {
                        ShareLink("Share the result", item: file)
                    }
                    if let failure = session.failure {
                        Text(failure).foregroundStyle(.red)
                    }
                }
                Section("Compute units") {
                    ForEach(session.lines, id: \.self) { line in
                        Text(line).monospacedDigit()
                    }
                }
            }
            .navigationTitle("Edgeline")
        }
        .onChange(of: scenePhase) { _, phase in
            if phase != .active { session.leftForeground = true }
        }
    }
}

/// State of the window. The compute units are timed one after the other, in a thread of their own.
@MainActor
final class Session: ObservableObject {
    @Published var title = "Core ML package"
    @Published var isRunning = false
    @Published var lines: [String] = []
    @Published var failure: String?
    @Published var file: URL?
    var leftForeground = false

    func measure() async {
        isRunning = true
        lines = []
        failure = nil
        file = nil
        UIApplication.shared.isIdleTimerDisabled = true
        defer {
            UIApplication.shared.isIdleTimerDisabled = false
            isRunning = false
        }
        do {
            let sample = try Sample.load()
            title = sample.title
            var units: [UnitResult] = []
            for unit in ComputeUnit.allCases {
                leftForeground = false
                var result = await Task.detached(priority: .userInitiated) {
                    measured(unit, with: sample)
                }.value
                result.leftForeground = leftForeground
                units.append(result)
                lines.append(result.summary)
            }
            let system = "\(UIDevice.current.systemName) \(UIDevice.current.systemVersion)"
            file = try ResultFile(bundleKey: sample.key, device: Device(system: system), plan: sample.plan, units: units)
                .write()
        } catch {
            failure = error.localizedDescription
        }
    }
}
