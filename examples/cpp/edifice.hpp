// Runs bundles of edifice-export with ONNX Runtime: one header, C++17, needs nlohmann/json besides.
//
//   Bundle    manifest.json, and files whose size and SHA-256 are checked before they are used
//   Model     window graph: frames [batch, sequence, embed_dim] -> output [batch, hidden_size]
//   Stream    stream and prefill graphs: one frame at a time, with a state to save, restore and rewind
//
// Errors are exceptions. Calls that are refused change nothing.
#pragma once

#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace edifice {

/// UTF-8 that may come from a file of anybody's, as a terminal may be given it: one line, in which nothing moves the
/// cursor, hides or reorders text.
inline std::string printable(const std::string& text) {
    std::string result;
    char escape[16];
    for (std::size_t i = 0; i < text.size();) {
        const auto lead = static_cast<unsigned char>(text[i]);
        const std::size_t size = lead < 0x80 ? 1 : lead >> 5 == 6 ? 2 : lead >> 4 == 14 ? 3 : lead >> 3 == 30 ? 4 : 0;
        std::uint32_t code = size < 2 ? lead : lead & (0x7fu >> size);
        bool sound = size > 0 && size <= text.size() - i;
        for (std::size_t j = 1; sound && j < size; ++j) {
            const auto byte = static_cast<unsigned char>(text[i + j]);
            sound = byte >> 6 == 2;
            code = code << 6 | (byte & 63u);
        }
        const auto within = [code](std::uint32_t first, std::uint32_t last) { return code >= first && code <= last; };
        const bool hidden = within(0, 0x1f) || within(0x7f, 0x9f) || code == 0xad || code == 0x61c ||
                            within(0x200b, 0x200f) || within(0x2028, 0x202e) || within(0x2060, 0x206f) ||
                            within(0xd800, 0xf8ff) || code == 0xfeff || within(0xfff9, 0xfffb) || code >= 0xe0000;
        if (code == '\n' || code == '\r') {
            result += ' ';
        } else if (!sound || hidden) {
            const unsigned shown = sound ? code : lead;
            std::snprintf(escape, sizeof escape, shown < 0x100 ? "\\x%02x" : "\\u{%x}", shown);
            result += escape;
        } else {
            result.append(text, i, size);
        }
        i += sound ? size : 1;
    }
    return result;
}

/// What all exceptions of this header are. What they say is printable.
struct Error : std::runtime_error {
    explicit Error(const std::string& message) : std::runtime_error(printable(message)) {}
};

/// The request can't be met: no such bundle or provider, a frame of another width. The caller's to correct.
struct RequestError : Error {
    using Error::Error;
};

/// A bundle is damaged, or ONNX Runtime failed on it.
struct CheckError : Error {
    using Error::Error;
};

using Shape = std::vector<std::int64_t>;
constexpr std::int64_t kBatch = -1, kSequence = -2;  // sizes of a shape that the caller chooses
constexpr int kSchema = 4;                           // of the manifests that this header reads
constexpr int kOldestRuntime = 24;                   // ONNX Runtime 1.24: the first that is right on every graph
constexpr float kMaxMagnitude = 1e12f;               // of numbers in frames, which models square: verified up to here

/// A path as UTF-8, for messages.
inline std::string text(const std::filesystem::path& path) {
    const auto utf8 = path.u8string();  // of char8_t from C++20 on
    return std::string(utf8.begin(), utf8.end());
}

inline std::string text(const Shape& shape) {
    std::string result = "[";
    for (const std::int64_t size : shape) {
        result += result.size() > 1 ? ", " : "";
        result += size == kBatch ? "batch" : size == kSequence ? "sequence" : std::to_string(size);
    }
    return result + "]";
}

/// Refuses a version of ONNX Runtime, such as "1.23.2", that is wrong on some graphs or fails on them.
inline void check_runtime(const std::string& version) {
    int major = 0, minor = 0;
    if (std::sscanf(version.c_str(), "%d.%d", &major, &minor) != 2 || major < 1 ||
        (major == 1 && minor < kOldestRuntime)) {
        throw RequestError("ONNX Runtime " + version + " is older than 1." + std::to_string(kOldestRuntime) +
                           ", the first that is right on every graph of a bundle; link and ship a newer one");
    }
}

/// How many numbers a tensor of this shape holds.
inline std::size_t count(const Shape& shape) {
    constexpr std::int64_t most = std::int64_t{1} << 40;
    std::int64_t product = 1;
    for (const std::int64_t size : shape) {
        if (size < 1 || product > most / size) {
            throw RequestError("shape " + text(shape) + " is empty or too large; give sizes from 1");
        }
        product *= size;
    }
    return static_cast<std::size_t>(product);
}

/// SHA-256 (FIPS 180-4) of bytes that come in pieces.
class Sha256 {
public:
    void update(const char* bytes, std::size_t size) {
        total_ += size;
        while (size > 0) {
            const std::size_t taken = std::min(size, block_.size() - filled_);
            std::memcpy(block_.data() + filled_, bytes, taken);
            filled_ += taken, bytes += taken, size -= taken;
            if (filled_ == block_.size()) {
                compress();
                filled_ = 0;
            }
        }
    }

    /// The digest of all bytes so far; ends the computation.
    std::string hex() {
        const std::uint64_t bits = total_ * 8;
        const std::string padding = '\x80' + std::string((119 - filled_) % 64, '\0');
        update(padding.data(), padding.size());
        std::array<char, 8> length{};
        for (std::size_t i = 0; i < 8; ++i) length[i] = static_cast<char>(bits >> (56 - 8 * i) & 255);
        update(length.data(), length.size());
        std::string digest;
        for (const std::uint32_t word : state_) {
            for (int shift = 28; shift >= 0; shift -= 4) digest += "0123456789abcdef"[word >> shift & 15];
        }
        return digest;
    }

private:
    static std::uint32_t rotate(std::uint32_t x, int by) { return x >> by | x << (32 - by); }

    void compress() {
        static constexpr std::array<std::uint32_t, 64> k{
            0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
            0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
            0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
            0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
            0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
            0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
            0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
            0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
        std::array<std::uint32_t, 64> w{};
        for (std::size_t i = 0; i < 64; ++i) w[i / 4] = w[i / 4] << 8 | block_[i];
        for (std::size_t i = 16; i < 64; ++i) {
            const std::uint32_t a = w[i - 15], b = w[i - 2];
            w[i] = w[i - 16] + (rotate(a, 7) ^ rotate(a, 18) ^ a >> 3) + w[i - 7] +
                   (rotate(b, 17) ^ rotate(b, 19) ^ b >> 10);
        }
        auto [a, b, c, d, e, f, g, h] = state_;
        for (std::size_t i = 0; i < 64; ++i) {
            const std::uint32_t first =
                h + (rotate(e, 6) ^ rotate(e, 11) ^ rotate(e, 25)) + ((e & f) ^ (~e & g)) + k[i] + w[i];
            const std::uint32_t second = (rotate(a, 2) ^ rotate(a, 13) ^ rotate(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
            h = g, g = f, f = e, e = d + first, d = c, c = b, b = a, a = first + second;
        }
        const std::array<std::uint32_t, 8> sums{a, b, c, d, e, f, g, h};
        for (std::size_t i = 0; i < 8; ++i) state_[i] += sums[i];
    }

    std::array<std::uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                        0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    std::array<unsigned char, 64> block_{};
    std::size_t filled_ = 0;
    std::uint64_t total_ = 0;
};

/// Reads an ONNX TensorProto: float32 or int64, with its numbers in raw_data (little endian).
inline Ort::Value parse_tensor(const std::string& bytes, const std::string& place) {
    const char *at = bytes.data(), *const end = at + bytes.size();
    const auto damaged = [&](const std::string& problem) {
        return CheckError("tensor " + place + ": " + problem + "; build or copy the bundle again");
    };
    const auto varint = [&] {
        std::uint64_t value = 0;
        for (int shift = 0; shift < 64; shift += 7) {
            if (at == end) throw damaged("ends too early");
            const auto byte = static_cast<unsigned char>(*at++);
            value |= std::uint64_t{byte & 127u} << shift;
            if (byte < 128) return value;
        }
        throw damaged("holds a number of more than 64 bits");
    };
    Shape shape;
    std::uint64_t type = 0;
    const char* raw = end;
    std::size_t size = 0;
    while (at != end) {
        const std::uint64_t key = varint(), field = key >> 3, wire = key & 7;
        if (wire == 0) {
            const std::uint64_t value = varint();
            if (field == 1) shape.push_back(static_cast<std::int64_t>(value));
            if (field == 2) type = value;
            if (field == 14 && value != 0) throw damaged("keeps its numbers in another file");
            continue;
        }
        if (wire != 1 && wire != 2 && wire != 5) throw damaged("is not a TensorProto");
        const std::uint64_t length = wire == 2 ? varint() : wire == 1 ? 8 : 4;
        if (length > static_cast<std::uint64_t>(end - at)) throw damaged("ends too early");
        const char* const next = at + length;
        if (wire == 2 && field == 9) raw = at, size = static_cast<std::size_t>(length);
        if (wire == 2 && field == 1) {  // sizes may be packed
            while (at < next) shape.push_back(static_cast<std::int64_t>(varint()));
            if (at != next) throw damaged("is not a TensorProto");
        }
        at = next;
    }
    constexpr std::uint64_t float32 = 1, int64 = 7;
    if (type != float32 && type != int64) throw damaged("has data_type " + std::to_string(type) + ", and not 1 or 7");
    const std::size_t width = type == float32 ? sizeof(float) : sizeof(std::int64_t);
    std::size_t expected = width;
    for (const std::int64_t each : shape) {
        if (each < 1 || expected > size / static_cast<std::size_t>(each))
            throw damaged("has another size than its shape");
        expected *= static_cast<std::size_t>(each);
    }
    if (expected != size) throw damaged("has another size than its shape");
    Ort::AllocatorWithDefaultOptions allocator;
    Ort::Value tensor = Ort::Value::CreateTensor(
        allocator, shape.data(), shape.size(),
        type == float32 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64);
    std::memcpy(tensor.GetTensorMutableRawData(), raw, size);
    return tensor;
}

struct TensorSpec {
    std::string name;
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    Shape shape;

    std::size_t width() const { return static_cast<std::size_t>(shape.back()); }

    Shape sizes(std::int64_t batch, std::int64_t sequence = 1) const {
        Shape result = shape;
        for (std::int64_t& size : result) size = size == kBatch ? batch : size == kSequence ? sequence : size;
        return result;
    }
};

/// What a stream carries from frame to frame: the graph reads past.<name> and gives present.<name>.
struct StateSpec {
    TensorSpec tensor;
    nlohmann::json initial;  // a number that fills it, or the file that holds it for one entry of the batch
};

struct GraphSpec {
    std::string model;
    std::vector<TensorSpec> inputs, outputs;
    std::vector<std::string> test_data;        // folders
    std::optional<std::string> test_sequence;  // a folder
    std::optional<std::int64_t> max_sequence;  // the most frames that it can compute
};

/// A bundle on disk. Nothing in it is trusted before it was checked.
class Bundle {
public:
    /// Reads the manifest. Files are checked when they are used, or all by check_files().
    explicit Bundle(std::filesystem::path folder) : path(std::move(folder)) {
        if (!std::filesystem::is_directory(path)) throw RequestError(place() + "no such folder; name a bundle's");
        if (!std::filesystem::is_regular_file(path / "manifest.json")) {
            throw RequestError(place() + "has no manifest.json, so it is not a bundle; name a bundle's folder");
        }
        try {
            parse(nlohmann::json::parse(load("manifest.json")));
        } catch (const nlohmann::json::exception& error) {
            throw damaged(error.what());
        }
    }

    std::filesystem::path path;
    std::string architecture;
    std::string weights;  // SHA-256 of the model's weights: whose states these are
    std::int64_t window_size = 0;
    std::map<std::string, GraphSpec> graphs;  // window, stream and prefill, or a part of them
    std::vector<StateSpec> states;

    bool has(const std::string& graph) const { return graphs.count(graph) != 0; }

    const GraphSpec& graph(const std::string& name) const {
        const auto found = graphs.find(name);
        if (found == graphs.end()) {
            throw RequestError(place() + "has no " + name + " graph; build it with --graph both");
        }
        return found->second;
    }

    /// Where a file is, once it was found to have the size and SHA-256 of the manifest.
    std::filesystem::path checked(const std::string& name) const {
        const auto found = files_.find(name);
        if (found == files_.end()) throw damaged("'" + name + "' is used and not listed under files");
        check(name, found->second);
        return path / name;
    }

    /// Where a model is, checked with all that is beside it: weights above 2 GiB are in files that it names itself.
    std::filesystem::path checked_model(const std::string& name) const {
        const std::filesystem::path model = checked(name);
        for (const auto& entry : std::filesystem::recursive_directory_iterator(model.parent_path())) {
            const auto utf8 = entry.path().lexically_relative(path).generic_u8string();
            const std::string file(utf8.begin(), utf8.end());
            if (entry.is_directory()) continue;
            if (files_.count(file) == 0) throw damaged("'" + file + "' is beside a model and not listed under files");
        }
        if (files_.count(name + ".data") != 0) checked(name + ".data");
        return model;
    }

    void check_files() const {
        for (const auto& [name, file] : files_) check(name, file);
    }

    Ort::Value tensor(const std::string& name) const {
        checked(name);
        return parse_tensor(load(name), text(path / name));
    }

private:
    struct File {
        std::uint64_t size;
        std::string sha256;
    };

    std::string place() const { return "bundle " + text(path) + ": "; }

    CheckError damaged(const std::string& problem) const {
        return CheckError(place() + "manifest.json: " + problem + "; build or copy the bundle again");
    }

    std::string load(const std::string& name) const {
        std::ifstream file(path / name, std::ios::binary);
        std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
        if (!file) throw CheckError(place() + "'" + name + "' can't be read; check its rights");
        return bytes;
    }

    void check(const std::string& name, const File& expected) const {
        if (!std::filesystem::is_regular_file(path / name)) {
            throw CheckError(place() + "'" + name + "' is missing; build or copy the bundle again");
        }
        std::ifstream file(path / name, std::ios::binary);
        std::vector<char> piece(1 << 16);
        Sha256 hash;
        std::uint64_t size = 0;
        while (file.read(piece.data(), static_cast<std::streamsize>(piece.size())), file.gcount() > 0) {
            hash.update(piece.data(), static_cast<std::size_t>(file.gcount()));
            size += static_cast<std::uint64_t>(file.gcount());
        }
        if (!file.eof()) throw CheckError(place() + "'" + name + "' can't be read; check its rights");
        const std::string found = hash.hex();
        if (found != expected.sha256) {
            throw CheckError(place() + "'" + name + "' was changed: its SHA-256 is " + found.substr(0, 12) +
                             "..., the manifest says " + expected.sha256.substr(0, 12) +
                             "...; build or copy the bundle again");
        }
        if (size != expected.size) {
            throw damaged("'" + name + "' has " + std::to_string(size) + " bytes, and should have " +
                          std::to_string(expected.size));
        }
    }

    void parse(const nlohmann::json& manifest) {
        const nlohmann::json& schema = manifest.at("schema_version");
        if (!schema.is_number_integer() || schema < 1) throw damaged("schema_version is " + schema.dump());
        if (schema > kSchema) {
            throw RequestError(place() + "has schema " + schema.dump() + ", newer than " + std::to_string(kSchema) +
                               ", the newest that this program reads; take a newer sample");
        }
        if (schema < kSchema) {
            throw RequestError(place() + "has schema " + schema.dump() + ", older than " + std::to_string(kSchema) +
                               "; build it again");
        }
        for (const auto& [name, entry] : manifest.at("files").items()) {
            files_[inside(name)] = {entry.at("size").get<std::uint64_t>(), entry.at("sha256").get<std::string>()};
        }
        architecture = manifest.at("architecture").get<std::string>();
        const auto reference = files_.find(inside(manifest.at("reference").get<std::string>()));
        if (reference == files_.end()) throw damaged("the reference is not listed under files");
        weights = reference->second.sha256;
        window_size = parse_frames(manifest.at("options").at("window_size"), "window_size");
        for (const nlohmann::json& entry : manifest.at("states")) {
            states.push_back({parse_tensor_spec(entry), entry.at("initial")});
            const nlohmann::json& initial = states.back().initial;
            if (initial.is_string()) {
                inside(initial.get<std::string>());
                continue;
            }
            const bool is_float = states.back().tensor.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
            const bool sound = is_float ? initial.is_number() && std::abs(initial.get<double>()) <= 0x1p127
                                        : initial.is_number_integer() && initial >= 0;
            if (!sound) throw damaged("a state starts from " + initial.dump());
        }
        for (const auto& [name, entry] : manifest.at("graphs").items()) {
            const GraphSpec spec = parse_graph(entry);
            const Shape free = name == "stream" ? Shape{kBatch} : Shape{kBatch, kSequence};
            const std::size_t carried = name == "window" ? 0 : states.size();
            if (!is_signature(spec.inputs, free, "past.", carried) ||
                !is_signature(spec.outputs, {kBatch}, "present.", carried)) {
                throw damaged("the " + name + " graph takes or gives other tensors than such a graph does");
            }
            graphs[name] = spec;
        }
        if (has("stream") != has("prefill") || graphs.size() != (has("window") ? 1u : 0u) + (has("stream") ? 2u : 0u)) {
            throw damaged("the graphs are not window, stream and prefill, or a part of them");
        }
    }

    /// Whether tensors are one of numbers, with these free sizes before its width, and then the states.
    bool is_signature(const std::vector<TensorSpec>& tensors, Shape first, const std::string& prefix,
                      std::size_t carried) const {
        if (tensors.size() != 1 + carried || tensors[0].type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) return false;
        first.push_back(tensors[0].shape.back());
        bool same = tensors[0].shape == first && first.back() > 0;
        for (std::size_t i = 0; i < carried; ++i) {
            const TensorSpec &found = tensors[i + 1], &state = states[i].tensor;
            same = same && found.name == prefix + state.name && found.type == state.type &&
                   found.shape == state.shape && state.shape[0] == kBatch &&
                   std::all_of(state.shape.begin() + 1, state.shape.end(), [](std::int64_t size) { return size > 0; });
        }
        return same;
    }

    GraphSpec parse_graph(const nlohmann::json& entry) const {
        GraphSpec spec;
        spec.model = inside(entry.at("model").get<std::string>());
        for (const nlohmann::json& tensor : entry.at("inputs")) spec.inputs.push_back(parse_tensor_spec(tensor));
        for (const nlohmann::json& tensor : entry.at("outputs")) spec.outputs.push_back(parse_tensor_spec(tensor));
        for (const nlohmann::json& folder : entry.at("test_data")) {
            spec.test_data.push_back(inside(folder.get<std::string>()));
        }
        if (spec.test_data.empty()) throw damaged("'" + spec.model + "' has no test data");
        if (const nlohmann::json& limit = entry.at("max_sequence"); !limit.is_null()) {
            spec.max_sequence = parse_frames(limit, "max_sequence");
        }
        if (const nlohmann::json& sequence = entry.at("test_sequence"); !sequence.is_null()) {
            spec.test_sequence = inside(sequence.at("folder").get<std::string>());
        }
        return spec;
    }

    /// A number of frames, within what edifice-export makes.
    std::int64_t parse_frames(const nlohmann::json& entry, const std::string& name) const {
        constexpr std::int64_t most = 8192;
        const auto frames = entry.get<std::int64_t>();
        if (frames < 1 || frames > most) {
            throw damaged(name + " is " + entry.dump() + ", and not 1 to " + std::to_string(most));
        }
        return frames;
    }

    TensorSpec parse_tensor_spec(const nlohmann::json& entry) const {
        TensorSpec spec;
        spec.name = entry.at("name").get<std::string>();
        const std::string dtype = entry.at("dtype").get<std::string>();
        if (dtype == "float32") spec.type = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
        if (dtype == "int64") spec.type = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
        for (const nlohmann::json& size : entry.at("shape")) {
            spec.shape.push_back(size == "batch" ? kBatch : size == "sequence" ? kSequence : size.get<std::int64_t>());
        }
        const bool sized = std::all_of(spec.shape.begin(), spec.shape.end(), [](std::int64_t size) {
            return size > 0 || size == kBatch || size == kSequence;
        });
        if (spec.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED || spec.shape.empty() || !sized) {
            throw damaged("'" + spec.name + "' is " + dtype + " " + entry.at("shape").dump());
        }
        return spec;
    }

    /// A path of the manifest, which may have been written to lead elsewhere.
    std::string inside(const std::string& name) const {
        bool sound = !name.empty() && name.front() != '/' && name.find_first_of("\\:") == std::string::npos &&
                     ("/" + name + "/").find("/../") == std::string::npos;
        for (const char letter : name) sound = sound && letter >= ' ' && letter <= '~';
        if (!sound) throw damaged("the path " + nlohmann::json(name).dump() + " leaves the bundle");
        return name;
    }

    std::map<std::string, File> files_;
};

inline void check_count(const std::string& name, std::int64_t value) {
    if (value < 1) throw RequestError(name + " is " + std::to_string(value) + "; give 1 or more");
}

/// Refuses numbers that are not of this shape, not finite, or beyond kMaxMagnitude.
inline void check_numbers(const std::string& name, const float* numbers, std::size_t size, const Shape& shape) {
    if (size != count(shape)) {
        throw RequestError(name + " has " + std::to_string(size) + " numbers, and the model takes " +
                           std::to_string(count(shape)) + " (float32 " + text(shape) + "); give frames of its width");
    }
    for (std::size_t i = 0; i < size; ++i) {
        if (std::abs(numbers[i]) <= kMaxMagnitude) continue;  // a NaN is not
        char value[32];
        std::snprintf(value, sizeof value, "%g", static_cast<double>(numbers[i]));
        const auto width = static_cast<std::size_t>(shape.back());
        const std::size_t frame = shape.size() == 3 ? i / width % static_cast<std::size_t>(shape[1]) : 0;
        throw RequestError(name + " holds " + value + " at " + std::to_string(i) +
                           (shape.size() == 3 ? " in frame " + std::to_string(frame) : "") +
                           (std::isfinite(numbers[i]) ? "; numbers up to 1e12 are taken, beyond which float32 may "
                                                        "overflow; scale or mend the input"
                                                      : "; give finite numbers only"));
    }
}

/// Refuses an output that is not finite.
inline void check_output(const std::string& name, const std::vector<float>& output, const char* consequence) {
    for (const float number : output) {
        if (std::isfinite(number)) continue;
        throw CheckError(name + " is not finite: float32 overflows in this model on these frames" + consequence +
                         "; scale them down, or mend the weights");
    }
}

/// A tensor that is no copy of these numbers: they must outlive it.
inline Ort::Value tensor_over(float* numbers, const Shape& shape) {
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    return Ort::Value::CreateTensor<float>(memory, numbers, count(shape), shape.data(), shape.size());
}

struct Options {
    std::string provider = "cpu";  // or cuda, dml, coreml, webgpu: that one or an error
    int threads = 1;               // within an operator
};

/// A bundle's graphs on an execution provider. Any number of threads may use one Model at once.
class Model {
public:
    explicit Model(Bundle bundle, Options options = {})
        : bundle_((check_library(), std::move(bundle))), options_(std::move(options)) {
        if (options_.threads < 1)
            throw RequestError("threads is " + std::to_string(options_.threads) + "; give 1 or more");
        configure();
    }

    const Bundle& bundle() const { return bundle_; }
    const Options& options() const { return options_; }

    /// Runs windows: float32 [batch, sequence, embed_dim], row by row, to [batch, hidden_size].
    std::vector<float> run(const std::vector<float>& frames, std::int64_t batch, std::int64_t sequence) {
        const GraphSpec& graph = bundle_.graph("window");
        const TensorSpec &input = graph.inputs[0], &output = graph.outputs[0];
        check_count("batch", batch);
        check_count("sequence", sequence);
        const Shape shape = input.sizes(batch, sequence), result_shape = output.sizes(batch);
        check_numbers(input.name, frames.data(), frames.size(), shape);
        if (graph.max_sequence && sequence > *graph.max_sequence) {
            throw RequestError(input.name + " has " + std::to_string(sequence) + " frames, and " +
                               bundle_.architecture + " computes at most the " + std::to_string(*graph.max_sequence) +
                               " that it was made for; give the last of them");
        }
        std::vector<float> result(count(result_shape));
        Ort::Value value = tensor_over(const_cast<float*>(frames.data()), shape);  // which only reads them
        Ort::Value result_value = tensor_over(result.data(), result_shape);
        const char *const input_name = input.name.c_str(), *const output_name = output.name.c_str();
        const auto session_held = session("window");
        try {
            session_held->Run(Ort::RunOptions{nullptr}, &input_name, &value, 1, &output_name, &result_value, 1);
        } catch (const Ort::Exception& error) {
            throw CheckError("ONNX Runtime failed on " + input.name + " float32 " + text(shape) + ": " + error.what());
        }
        check_output(output.name, result, "");
        return result;
    }

    /// The session of a graph, loaded when it is first asked for. It lives as long as someone holds it.
    std::shared_ptr<Ort::Session> session(const std::string& name) {
        const GraphSpec& graph = bundle_.graph(name);
        const std::lock_guard<std::mutex> lock(mutex_);
        std::shared_ptr<Ort::Session>& held = sessions_[name];
        if (held == nullptr) {
            const std::filesystem::path path = bundle_.checked_model(graph.model);
            try {
                // The path goes as it is, of wide characters on Windows.
                const auto loaded =
                    std::make_shared<Loaded>(Loaded{Ort::Env(kSilent, "edifice"), Ort::Session(nullptr)});
                loaded->session = Ort::Session(loaded->env, path.c_str(), session_options_);
                check_signature(graph, loaded->session, path);
                held = std::shared_ptr<Ort::Session>(loaded, &loaded->session);
            } catch (const Ort::Exception& error) {
                throw CheckError("ONNX Runtime can't load " + text(path) + " with provider " + options_.provider +
                                 ": " + error.what());
            }
        }
        return held;
    }

private:
    struct Loaded {
        Ort::Env env;  // ONNX Runtime counts them: all are one
        Ort::Session session;
    };

    // Whatever goes wrong is in an exception, so nothing need be on standard error as well.
    static constexpr OrtLoggingLevel kSilent = ORT_LOGGING_LEVEL_FATAL;

    /// An older library has no table of functions for newer headers, and every call of it would go nowhere.
    static void check_library() {
        check_runtime(Ort::GetVersionString());  // the library's, which may be newer than the headers
        if (OrtGetApiBase()->GetApi(ORT_API_VERSION) == nullptr) {
            throw RequestError("ONNX Runtime " + Ort::GetVersionString() + " is older than the headers of 1." +
                               std::to_string(ORT_API_VERSION) +
                               " that this program was built with; ship a library that is not");
        }
    }

    /// Refuses a model that is not what the manifest says, before buffers are made for it.
    static void check_signature(const GraphSpec& graph, const Ort::Session& session,
                                const std::filesystem::path& path) {
        Ort::AllocatorWithDefaultOptions allocator;
        const auto check = [&](const std::vector<TensorSpec>& specs, std::size_t found, auto name_of, auto type_of) {
            bool same = specs.size() == found;
            for (std::size_t i = 0; same && i < found; ++i) {
                const auto type = type_of(i);
                const auto info = type.GetTensorTypeAndShapeInfo();
                same = specs[i].name == name_of(i).get() && specs[i].type == info.GetElementType() &&
                       specs[i].sizes(-1, -1) == info.GetShape();  // -1 is ONNX Runtime's sign for a free size
            }
            if (!same) {
                throw CheckError(text(path) + " takes or gives other tensors than the manifest says, such as " +
                                 specs[0].name + " " + text(specs[0].shape) + "; build or copy the bundle again");
            }
        };
        check(
            graph.inputs, session.GetInputCount(),
            [&](std::size_t i) { return session.GetInputNameAllocated(i, allocator); },
            [&](std::size_t i) { return session.GetInputTypeInfo(i); });
        check(
            graph.outputs, session.GetOutputCount(),
            [&](std::size_t i) { return session.GetOutputNameAllocated(i, allocator); },
            [&](std::size_t i) { return session.GetOutputTypeInfo(i); });
    }

    void configure() {
        session_options_ = Ort::SessionOptions();
        session_options_.SetIntraOpNumThreads(options_.threads);
        struct Provider {
            std::string name, full, key;
        };
        static const std::array<Provider, 5> known{{{"cpu", "CPUExecutionProvider", ""},
                                                    {"cuda", "CUDAExecutionProvider", ""},
                                                    {"dml", "DmlExecutionProvider", "DML"},
                                                    {"coreml", "CoreMLExecutionProvider", "CoreML"},
                                                    {"webgpu", "WebGpuExecutionProvider", "WebGPU"}}};
        const auto asked = std::find_if(known.begin(), known.end(),
                                        [&](const Provider& each) { return each.name == options_.provider; });
        if (asked == known.end()) {
            throw RequestError("provider '" + options_.provider +
                               "' is none that this program knows; name cpu, cuda, dml, coreml or webgpu");
        }
        const std::vector<std::string> built_in = Ort::GetAvailableProviders();
        if (std::find(built_in.begin(), built_in.end(), asked->full) == built_in.end()) {
            throw RequestError("provider '" + asked->name + "' is not in this build of ONNX Runtime " +
                               Ort::GetVersionString() + "; link one that has it, or name cpu");
        }
        try {
            if (asked->name == "cuda") {
                const OrtApi& api = Ort::GetApi();
                OrtCUDAProviderOptionsV2* cuda = nullptr;
                Ort::ThrowOnError(api.CreateCUDAProviderOptions(&cuda));
                const std::unique_ptr<OrtCUDAProviderOptionsV2, void (*)(OrtCUDAProviderOptionsV2*)> held(
                    cuda, [](OrtCUDAProviderOptionsV2* each) { Ort::GetApi().ReleaseCUDAProviderOptions(each); });
                const char *const key = "use_tf32", *const off = "0";  // its 10 bits of mantissa are not enough
                Ort::ThrowOnError(api.UpdateCUDAProviderOptions(cuda, &key, &off, 1));
                session_options_.AppendExecutionProvider_CUDA_V2(*cuda);
            } else if (asked->name != "cpu") {
                if (asked->name == "dml") session_options_.DisableMemPattern();  // it asks for that
                session_options_.AppendExecutionProvider(asked->key, {});
            }
        } catch (const Ort::Exception& error) {
            throw RequestError("provider '" + asked->name + "' can't be had: " + error.what());
        }
    }

    Bundle bundle_;
    Options options_;
    Ort::SessionOptions session_options_{nullptr};
    std::mutex mutex_;
    std::map<std::string, std::shared_ptr<Ort::Session>> sessions_;
};

/// A state of a stream, copied. To take the next one into the same object allocates nothing.
class Snapshot {
    friend class Stream;
    std::string identity_;
    std::uint64_t moment_ = 0;
    std::vector<std::vector<char>> states_;
};

/// A number of streams side by side, frame by frame. One thread at a time; others may have their own of one Model.
///
/// The states are in a ring of buffer sets. A step reads one set and writes the next, so nothing is updated in place,
/// and rewind only moves an index. After the constructor, step allocates nothing beyond what ONNX Runtime does in a
/// run.
class Stream {
public:
    /// history: the most frames that it can be rewound by; each keeps a copy of the states.
    explicit Stream(Model& model, std::int64_t batch = 1, std::size_t history = 16)
        : batch_(batch),
          history_(history),
          frame_(model.bundle().graph("stream").inputs[0]),
          sequence_(model.bundle().graph("prefill").inputs[0]),
          output_(model.bundle().graph("stream").outputs[0]),
          states_(model.bundle().states),
          session_(model.session("stream")),
          prefill_session_(model.session("prefill")),
          in_place_(model.options().provider == "cpu"),
          identity_(model.bundle().weights + " with batch " + std::to_string(batch)),
          frame_shape_((check_count("batch", batch), frame_.sizes(batch))),
          numbers_(count(frame_shape_)),
          result_(count(output_.sizes(batch))) {
        if (history > 100'000) throw RequestError("history is " + std::to_string(history) + "; give at most 100000");
        numbers_value_ = tensor_over(numbers_.data(), frame_shape_);
        result_value_ = tensor_over(result_.data(), output_.sizes(batch));
        for (const auto& [tensor, initial] : states_) {
            past_.push_back("past." + tensor.name);
            present_.push_back("present." + tensor.name);
            const bool is_float = tensor.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
            bytes_.push_back(count(tensor.sizes(batch)) * (is_float ? sizeof(float) : sizeof(std::int64_t)));
        }
        initial_ = allocate();
        write_initial(model.bundle());
        // Beside the history and the present, one that a run may fail on without harm to either.
        for (std::size_t i = 0; i < history + 2; ++i) slots_.push_back(allocate());
        for (std::size_t i = 0; i < slots_.size(); ++i) {
            bindings_.emplace_back(*session_);
            bind_inputs(bindings_[i], frame_, numbers_value_, slots_[i]);
            bind_outputs(bindings_[i], slots_[after(i)]);
        }
        reset();
    }

    std::int64_t batch() const { return batch_; }
    std::size_t history() const { return history_; }

    /// By how many frames it can be rewound now.
    std::size_t rewindable() const { return rewindable_; }

    /// One frame on: float32 [batch, embed_dim] to [batch, hidden_size], which is good until the next call.
    const std::vector<float>& step(const float* frame, std::size_t size) {
        check_numbers(frame_.name, frame, size, frame_shape_);
        std::copy(frame, frame + size, numbers_.begin());
        run(*session_, bindings_[current_], frame_, numbers_value_, frame_shape_);
        return result_;
    }

    const std::vector<float>& step(const std::vector<float>& frame) { return step(frame.data(), frame.size()); }

    /// Many frames on at once: [batch, sequence, embed_dim] to the last output. To rewind, it is one frame.
    const std::vector<float>& prefill(const std::vector<float>& frames, std::int64_t sequence) {
        check_count("sequence", sequence);
        const Shape shape = sequence_.sizes(batch_, sequence);
        check_numbers(sequence_.name, frames.data(), frames.size(), shape);
        const Ort::Value value = tensor_over(const_cast<float*>(frames.data()), shape);  // only read
        Ort::IoBinding binding(*prefill_session_);
        bind_inputs(binding, sequence_, value, slots_[current_]);
        bind_outputs(binding, slots_[after(current_)]);
        run(*prefill_session_, binding, sequence_, value, shape);
        return result_;
    }

    /// Back to before the first frame; there is nothing to rewind then.
    void reset() {
        Slot& slot = slots_[current_];
        slot.moment = next_moment();
        for (std::size_t i = 0; i < slot.states.size(); ++i) {
            std::memcpy(slot.states[i].GetTensorMutableRawData(), initial_.states[i].GetTensorRawData(), bytes_[i]);
        }
        rewindable_ = 0;
    }

    Snapshot snapshot() const {
        Snapshot taken;
        snapshot(taken);
        return taken;
    }

    void snapshot(Snapshot& into) const {
        const Slot& slot = slots_[current_];
        into.identity_ = identity_;
        into.moment_ = slot.moment;
        into.states_.resize(slot.states.size());
        for (std::size_t i = 0; i < slot.states.size(); ++i) {
            const char* bytes = static_cast<const char*>(slot.states[i].GetTensorRawData());
            into.states_[i].assign(bytes, bytes + bytes_[i]);
        }
    }

    /// Goes to a snapshot of this stream, or of another of the same weights and batch. The history goes back with it
    /// where it holds that moment, and is forgotten otherwise.
    void restore(const Snapshot& mark) {
        bool same = mark.identity_ == identity_ && mark.states_.size() == bytes_.size();
        for (std::size_t i = 0; same && i < bytes_.size(); ++i) same = mark.states_[i].size() == bytes_[i];
        if (!same) {
            throw RequestError("the snapshot is of weights " + (mark.states_.empty() ? "none" : mark.identity_) +
                               ", and this stream of weights " + identity_ + "; restore it where it was taken");
        }
        for (std::size_t frames = 0; frames <= rewindable_; ++frames) {
            if (slots_[before(frames)].moment == mark.moment_) return rewind(frames);
        }
        current_ = after(current_);
        rewindable_ = 0;
        Slot& slot = slots_[current_];
        slot.moment = mark.moment_;
        for (std::size_t i = 0; i < slot.states.size(); ++i) {
            std::memcpy(slot.states[i].GetTensorMutableRawData(), mark.states_[i].data(), bytes_[i]);
        }
    }

    /// Back by a number of frames. Copies nothing.
    void rewind(std::size_t frames) {
        if (frames > rewindable_) {
            throw RequestError("rewind by " + std::to_string(frames) + " frames: the history holds " +
                               std::to_string(rewindable_) + ", of at most " + std::to_string(history_) +
                               "; give the stream a longer history, or keep snapshots");
        }
        current_ = before(frames);
        rewindable_ -= frames;
    }

private:
    struct Slot {
        std::vector<Ort::Value> states;
        std::uint64_t moment = 0;  // no two states of a program have the same
    };

    static std::uint64_t next_moment() {
        static std::atomic<std::uint64_t> moments{0};
        return ++moments;
    }

    std::size_t after(std::size_t slot) const { return (slot + 1) % slots_.size(); }
    std::size_t before(std::size_t frames) const { return (current_ + slots_.size() - frames) % slots_.size(); }

    void run(Ort::Session& session, Ort::IoBinding& binding, const TensorSpec& input, const Ort::Value& value,
             const Shape& shape) {
        Slot& written = slots_[after(current_)];
        try {
            // Where the provider has a memory of its own, binding an input copies it there: once is not enough.
            if (!in_place_) bind_inputs(binding, input, value, slots_[current_]);
            written.moment = next_moment();
            session.Run(Ort::RunOptions{nullptr}, binding);
        } catch (const Ort::Exception& error) {
            throw CheckError("ONNX Runtime failed on " + input.name + " float32 " + text(shape) + ": " + error.what());
        }
        check_output(output_.name, result_, ", and the stream stays where it was");
        current_ = after(current_);
        rewindable_ = std::min(rewindable_ + 1, history_);
    }

    void bind_inputs(Ort::IoBinding& binding, const TensorSpec& input, const Ort::Value& value, const Slot& slot) {
        binding.BindInput(input.name.c_str(), value);
        for (std::size_t i = 0; i < states_.size(); ++i) binding.BindInput(past_[i].c_str(), slot.states[i]);
    }

    void bind_outputs(Ort::IoBinding& binding, const Slot& slot) {
        binding.BindOutput(output_.name.c_str(), result_value_);
        for (std::size_t i = 0; i < states_.size(); ++i) binding.BindOutput(present_[i].c_str(), slot.states[i]);
    }

    Slot allocate() const {
        Slot slot;
        Ort::AllocatorWithDefaultOptions allocator;
        for (const StateSpec& state : states_) {
            const Shape shape = state.tensor.sizes(batch_);
            slot.states.push_back(Ort::Value::CreateTensor(allocator, shape.data(), shape.size(), state.tensor.type));
        }
        return slot;
    }

    /// The first state: each entry of the batch has the same.
    void write_initial(const Bundle& bundle) {
        for (std::size_t i = 0; i < states_.size(); ++i) {
            const TensorSpec& tensor = states_[i].tensor;
            const nlohmann::json& initial = states_[i].initial;
            char* const bytes = static_cast<char*>(initial_.states[i].GetTensorMutableRawData());
            const std::size_t size = bytes_[i] / static_cast<std::size_t>(batch_);
            if (initial.is_string()) {
                const Ort::Value one = bundle.tensor(initial.get<std::string>());
                const auto found = one.GetTensorTypeAndShapeInfo();
                if (found.GetElementType() != tensor.type || found.GetShape() != tensor.sizes(1)) {
                    throw CheckError("bundle " + text(bundle.path) + ": '" + initial.get<std::string>() +
                                     "' has shape " + text(found.GetShape()) + ", and state " + tensor.name + " is " +
                                     text(tensor.shape) + " of one type; build the bundle again");
                }
                for (std::int64_t entry = 0; entry < batch_; ++entry) {
                    std::memcpy(bytes + static_cast<std::size_t>(entry) * size, one.GetTensorRawData(), size);
                }
            } else if (tensor.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
                std::fill_n(initial_.states[i].GetTensorMutableData<float>(), bytes_[i] / sizeof(float),
                            initial.get<float>());
            } else {
                std::fill_n(initial_.states[i].GetTensorMutableData<std::int64_t>(), bytes_[i] / sizeof(std::int64_t),
                            initial.get<std::int64_t>());
            }
        }
    }

    std::int64_t batch_;
    std::size_t history_;
    TensorSpec frame_, sequence_, output_;
    std::vector<StateSpec> states_;
    std::shared_ptr<Ort::Session> session_, prefill_session_;
    bool in_place_;
    std::string identity_;
    Shape frame_shape_;
    std::vector<float> numbers_, result_;  // what the bindings read and write
    Ort::Value numbers_value_{nullptr}, result_value_{nullptr};
    std::vector<std::string> past_, present_;
    std::vector<std::size_t> bytes_;  // of each state
    Slot initial_;
    std::vector<Slot> slots_;
    std::vector<Ort::IoBinding> bindings_;  // the i-th reads slot i and writes the one after it
    std::size_t current_ = 0, rewindable_ = 0;
};

}  // namespace edifice
