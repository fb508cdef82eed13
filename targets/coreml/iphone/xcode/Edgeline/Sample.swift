// The sample images of the bundle, as inputs of the package, and the comparison of its logits with the expected ones.

import CoreML
import CoreVideo
import Foundation

/// Contents of bundle.json. `images` has `count` images in `queries` inputs of the package, the last one padded.
struct Sample: Decodable, Sendable {
    let version: Int
    let key: String
    let title: String
    let inputName: String
    let outputName: String
    let kind: String  // float16 or float32: an array; bgra: a picture
    let shape: [Int]  // of one input: batch, channels, rows, columns; or rows, columns, 4
    let count: Int
    let classes: Int
    let images: Data  // little-endian
    let logits: Data  // float32, little-endian: `count` rows of `classes`
    let plan: Plan

    static func load() throws -> Sample {
        guard let url = Bundle.main.url(forResource: "bundle", withExtension: "json") else {
            throw Failure("the app has no bundle.json: build it again from the whole folder")
        }
        let decoder = JSONDecoder()
        decoder.keyDecodingStrategy = .convertFromSnakeCase
        let sample = try decoder.decode(Sample.self, from: Data(contentsOf: url))
        guard sample.version == 1 else {
            throw Failure("bundle.json has version \(sample.version), expected 1")
        }
        return sample
    }

    func queries() throws -> [MLFeatureProvider] {
        let width = ["float16": 2, "float32": 4, "bgra": 1][kind] ?? 1
        let size = shape.reduce(width, *)
        return try stride(from: 0, to: images.count, by: size).map { start in
            let bytes = images.subdata(in: start..<(start + size))
            let value = try kind == "bgra" ? picture(bytes) : array(bytes)
            return try MLDictionaryFeatureProvider(dictionary: [inputName: value])
        }
    }

    func agreement(of model: MLModel, on queries: [MLFeatureProvider]) throws -> Agreement {
        var found: [Float] = []
        for query in queries {
            let output = try model.prediction(from: query)
            guard let values = output.featureValue(for: outputName)?.multiArrayValue else {
                throw Failure("the package has no output \(outputName)")
            }
            found += MLShapedArray<Float>(converting: values).scalars
        }
        let expected = logits.withUnsafeBytes { Array($0.bindMemory(to: Float.self)) }
        guard found.count >= expected.count else {
            throw Failure("the package returned \(found.count) logits, expected \(expected.count)")
        }
        return Agreement(expected: expected, found: Array(found.prefix(expected.count)), classes: classes)
    }

    private func array(_ bytes: Data) throws -> MLFeatureValue {
        let array = try MLMultiArray(
            shape: shape.map { NSNumber(value: $0) },
            dataType: kind == "float16" ? .float16 : .float32
        )
        array.withUnsafeMutableBytes { target, _ in target.copyBytes(from: bytes) }
        return MLFeatureValue(multiArray: array)
    }

    private func picture(_ bytes: Data) throws -> MLFeatureValue {
        let (rows, columns) = (shape[0], shape[1])
        let attributes = [kCVPixelBufferIOSurfacePropertiesKey as String: [String: Any]()] as CFDictionary
        var created: CVPixelBuffer?
        CVPixelBufferCreate(nil, columns, rows, kCVPixelFormatType_32BGRA, attributes, &created)
        guard let buffer = created else {
            throw Failure("no pixel buffer of \(rows) x \(columns) pixels")
        }
        CVPixelBufferLockBaseAddress(buffer, [])
        defer { CVPixelBufferUnlockBaseAddress(buffer, []) }
        guard let base = CVPixelBufferGetBaseAddress(buffer) else {
            throw Failure("the pixel buffer has no memory")
        }
        let pitch = CVPixelBufferGetBytesPerRow(buffer)
        bytes.withUnsafeBytes { source in
            for row in 0..<rows {
                memcpy(base + row * pitch, source.baseAddress! + row * columns * 4, columns * 4)
            }
        }
        return MLFeatureValue(pixelBuffer: buffer)
    }
}

/// Images with the same most likely class, and the signal-to-noise ratio of the logits; nil if a logit is not finite.
struct Agreement: Encodable, Sendable {
    let images: Int
    let equal: Int
    let snrDb: Double?

    init(expected: [Float], found: [Float], classes: Int) {
        images = expected.count / classes
        var same = 0
        for start in stride(from: 0, to: expected.count, by: classes) {
            let row = start..<(start + classes)
            let one = row.max { expected[$0] < expected[$1] }
            let other = row.max { found[$0] < found[$1] }
            if one == other { same += 1 }
        }
        equal = same
        let signal = expected.reduce(0) { $0 + Double($1) * Double($1) }
        let noise = zip(expected, found).reduce(0) { $0 + pow(Double($1.0) - Double($1.1), 2) }
        let ratio = noise == 0 ? 200 : 10 * log10(max(signal, 1e-300) / noise)
        snrDb = ratio.isFinite ? ratio : nil
    }
}
