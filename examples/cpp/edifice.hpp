// Runs bundles of edifice-export with ONNX Runtime: one header, C++17, needs nlohmann/json besides.
//
//   Bundle    manifest.json, and files whose size and SHA-256 are checked before they are used
//   Model     window graph: all frames, or whatever else a module takes, at once
//   Stream    stream and prefill graphs: one frame at a time, with a state to save, restore and rewind
//   Tensor    what they give: numbers of float, Ort::Float16_t, std::int64_t, std::int32_t or bool
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
#include <iterator>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
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

/// The request can't be met: no such bundle or provider, a tensor of another shape. The caller's to correct.
struct RequestError : Error {
    using Error::Error;
};

/// A bundle is damaged, or ONNX Runtime failed on it.
struct CheckError : Error {
    using Error::Error;
};

using Shape = std::vector<std::int64_t>;
using Sizes = std::map<std::string, std::int64_t>;  // what symbols stand for

constexpr int kSchema = 6;                  // of the manifests that this header reads
constexpr int kOldestRuntime = 24;          // ONNX Runtime 1.24: the first that is right on every graph
constexpr double kMaxMagnitude = 1e12;      // of floats that models take, which may square them: verified up to here
constexpr std::int64_t kMaxSize = 1 << 20;  // of what a graph is made for

/// A path as UTF-8, for messages.
inline std::string text(const std::filesystem::path& path) {
    const auto utf8 = path.u8string();  // of char8_t from C++20 on
    return std::string(utf8.begin(), utf8.end());
}

inline std::string text(const Shape& shape) {
    std::string result = "[";
    for (const std::int64_t size : shape) result += (result.size() > 1 ? ", " : "") + std::to_string(size);
    return result + "]";
}

/// A size of a tensor in a manifest: a number, or free: a symbol or, of some outputs, an expression of symbols.
struct Size {
    std::int64_t number = 0;
    std::string free;

    bool operator==(const Size& other) const { return number == other.number && free == other.free; }
};

inline std::string text(const std::vector<Size>& shape) {
    std::string result = "[";
    for (const Size& size : shape) {
        result += (result.size() > 1 ? ", " : "") + (size.free.empty() ? std::to_string(size.number) : size.free);
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

/// What tensors may hold.
struct Type {
    ONNXTensorElementDataType code;  // the same number as in ONNX's files
    const char* name;
    std::size_t bytes;
};

constexpr std::array<Type, 5> kTypes{{{ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, "float32", 4},
                                      {ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16, "float16", 2},
                                      {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, "int64", 8},
                                      {ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32, "int32", 4},
                                      {ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL, "bool", sizeof(bool)}}};

inline const Type& type_of(ONNXTensorElementDataType code) {
    for (const Type& type : kTypes) {
        if (type.code == code) return type;
    }
    throw RequestError("a tensor of ONNX's type " + std::to_string(static_cast<int>(code)) +
                       "; there are float32, float16, int64, int32 and bool, take one of those");
}

/// Calls a function with a zero of a tensor's type, so that it is compiled for each.
template <class Call>
auto with_type(ONNXTensorElementDataType code, Call call) {
    switch (type_of(code).code) {
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return call(Ort::Float16_t{});
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return call(std::int64_t{});
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: return call(std::int32_t{});
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL: return call(bool{});
        default: return call(float{});
    }
}

inline double to_double(Ort::Float16_t number) { return double{number.ToFloat()}; }

template <class T>
double to_double(T number) {
    return static_cast<double>(number);
}

/// Numbers of the caller's, row by row, which a call reads and does not keep: of a vector, an array, a Tensor.
struct Numbers {
    Numbers(ONNXTensorElementDataType type_code, const void* at, std::size_t how_many)
        : type(type_code), data(at), size(how_many) {}

    template <class T>
    Numbers(const T* at, std::size_t how_many) : Numbers(Ort::TypeToTensorType<T>::type, at, how_many) {}

    template <class Array, class = decltype(std::data(std::declval<const Array&>()))>
    Numbers(const Array& array) : Numbers(std::data(array), std::size(array)) {}

    ONNXTensorElementDataType type;
    const void* data;
    std::size_t size;
};

/// What a call of a Model takes.
struct Input {
    Numbers numbers;
    Shape shape;
};

/// Numbers of one type and shape, row by row.
class Tensor {
public:
    explicit Tensor(Ort::Value value) : value_(std::move(value)) {
        const auto info = value_.GetTensorTypeAndShapeInfo();
        type_ = info.GetElementType();
        shape_ = info.GetShape();
        size_ = info.GetElementCount();
    }

    /// Room for numbers that are to be written.
    Tensor(ONNXTensorElementDataType type, const Shape& shape) : Tensor(allocate(type, shape)) {}

    ONNXTensorElementDataType type() const { return type_; }
    const Shape& shape() const { return shape_; }
    std::size_t size() const { return size_; }
    std::size_t byte_size() const { return size_ * type_of(type_).bytes; }
    const Ort::Value& value() const { return value_; }

    const void* bytes() const { return value_.GetTensorRawData(); }
    void* bytes() { return value_.GetTensorMutableRawData(); }

    /// Its size() numbers, as T must say what they are.
    template <class T>
    const T* data() const {
        check<T>();
        return static_cast<const T*>(bytes());
    }

    template <class T>
    T* data() {
        check<T>();
        return static_cast<T*>(bytes());
    }

    operator Numbers() const { return {type_, bytes(), size_}; }
    operator Input() const { return {*this, shape_}; }

private:
    static Ort::Value allocate(ONNXTensorElementDataType type, const Shape& shape) {
        Ort::AllocatorWithDefaultOptions allocator;
        return Ort::Value::CreateTensor(allocator, shape.data(), shape.size(), type);
    }

    template <class T>
    void check() const {
        const Type &asked = type_of(Ort::TypeToTensorType<T>::type), &held = type_of(type_);
        if (asked.code == held.code) return;
        throw RequestError(std::string("a tensor of ") + held.name + " was read as " + asked.name +
                           "; read it as what it is");
    }

    Ort::Value value_;
    ONNXTensorElementDataType type_ = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    Shape shape_;
    std::size_t size_ = 0;
};

/// Reads an ONNX TensorProto with its numbers in raw_data (little endian).
inline Tensor parse_tensor(const std::string& bytes, const std::string& place) {
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
    std::uint64_t code = 0;
    const char* raw = end;
    std::size_t size = 0;
    while (at != end) {
        const std::uint64_t key = varint(), field = key >> 3, wire = key & 7;
        if (wire == 0) {
            const std::uint64_t value = varint();
            if (field == 1) shape.push_back(static_cast<std::int64_t>(value));
            if (field == 2) code = value;
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
    const auto type = std::find_if(kTypes.begin(), kTypes.end(),
                                   [&](const Type& each) { return code == static_cast<std::uint64_t>(each.code); });
    if (type == kTypes.end()) throw damaged("has the data_type " + std::to_string(code) + ", which no graph takes");
    std::size_t expected = type->bytes;
    for (const std::int64_t each : shape) {
        if (each < 1 || expected > size / static_cast<std::size_t>(each))
            throw damaged("has another size than its shape");
        expected *= static_cast<std::size_t>(each);
    }
    if (expected != size) throw damaged("has another size than its shape");
    const bool is_bool = type->code == ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
    if (is_bool && std::any_of(raw, end, [](char byte) { return byte != 0 && byte != 1; })) {
        throw damaged("holds truths that are not 0 or 1");
    }
    Tensor tensor(type->code, shape);
    std::memcpy(tensor.bytes(), raw, size);
    return tensor;
}

/// What an input may hold, and what the self-check draws it from.
struct Values {
    std::string kind = "normal";                          // normal, ids, integers or mask
    std::int64_t below = 0;                               // of ids and integers: they are drawn from 0 and below it
    double least = -kMaxMagnitude, most = kMaxMagnitude;  // beyond which numbers are refused
};

struct TensorSpec {
    std::string name;
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    std::vector<Size> shape;
    Values values;  // of an input

    /// Its shape where its symbols stand for these numbers.
    Shape at(const Sizes& sizes) const {
        Shape result;
        for (const Size& size : shape) result.push_back(size.free.empty() ? size.number : sizes.at(size.free));
        return result;
    }

    /// Whether it is the same but for its name and values.
    bool is_like(const TensorSpec& other) const { return type == other.type && shape == other.shape; }
};

inline std::string text(const TensorSpec& spec) {
    return spec.name + " " + type_of(spec.type).name + " " + text(spec.shape);
}

inline std::string text(const std::vector<TensorSpec>& specs) {
    std::string result;
    for (const TensorSpec& spec : specs) result += (result.empty() ? "" : ", ") + text(spec);
    return result;
}

/// What a stream carries from frame to frame: the graph reads past.<name> and gives present.<name>.
struct StateSpec {
    TensorSpec tensor;
    nlohmann::json initial;  // a number that fills it, or the file that holds it for one entry of the batch
};

/// The least and the most that a free size may be.
struct Limits {
    std::int64_t least = 1, most = std::numeric_limits<std::int64_t>::max();
};

struct GraphSpec {
    std::string model;
    std::vector<TensorSpec> inputs, outputs;   // its own, and then those of states
    std::size_t states = 0;                    // how many it carries
    std::vector<std::string> test_data;        // folders
    std::map<std::string, Limits> limits;      // by symbol
    std::optional<std::string> test_sequence;  // a folder

    std::vector<TensorSpec> own_inputs() const { return {inputs.begin(), inputs.end() - carried()}; }
    std::vector<TensorSpec> own_outputs() const { return {outputs.begin(), outputs.end() - carried()}; }

private:
    std::ptrdiff_t carried() const { return static_cast<std::ptrdiff_t>(states); }
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
    std::string program;  // name of the architecture, or of the module's class
    bool is_module = false;
    std::string weights;                      // SHA-256 of the model's weights: whose states these are
    Sizes sizes;                              // what graphs are made for; other numbers will do
    std::string frames;                       // the symbol of frames, empty where there are none
    std::map<std::string, GraphSpec> graphs;  // window, stream and prefill, or a part of them
    std::vector<StateSpec> states;

    /// Frames that the model was made for at once; 1 where there are no frames.
    std::int64_t window_size() const { return frames.empty() ? 1 : sizes.at(frames); }

    bool has(const std::string& graph) const { return graphs.count(graph) != 0; }

    const GraphSpec& graph(const std::string& name) const {
        const auto found = graphs.find(name);
        if (found != graphs.end()) return found->second;
        std::string remedy = "build it with --graph both";
        if (is_module && name == "stream") {
            remedy = "its module has no step(*frame, state) and initial_state(batch); give it both and export it again";
        }
        if (is_module && name == "prefill") remedy = "use step";
        throw RequestError(place() + "has no " + name + " graph; " + remedy);
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

    Tensor tensor(const std::string& name) const {
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
        program = manifest.at("program").at("name").get<std::string>();
        const std::string kind = manifest.at("program").at("kind").get<std::string>();
        is_module = kind == "module";
        if (!is_module && kind != "architecture") throw damaged("the program's kind is '" + kind + "'");
        weights = parse_weights(manifest);
        for (const auto& [symbol, size] : manifest.at("sizes").items()) {
            sizes[symbol] = whole(size, 1, kMaxSize, "the size " + symbol);
        }
        if (const nlohmann::json& symbol = manifest.at("frames"); !symbol.is_null()) {
            frames = symbol.get<std::string>();
            if (sizes.count(frames) == 0) throw damaged("frames is '" + frames + "', which is none of the sizes");
        }
        for (const nlohmann::json& entry : manifest.at("states")) states.push_back(parse_state(entry));
        for (const auto& [name, entry] : manifest.at("graphs").items()) graphs[name] = parse_graph(name, entry);
        check_graphs();
    }

    std::string parse_weights(const nlohmann::json& manifest) const {
        const nlohmann::json& reference = manifest.at("reference");
        if (reference.is_null()) return manifest.at("weights").at("sha256").get<std::string>();  // of a module
        const auto found = files_.find(inside(reference.get<std::string>()));
        if (found == files_.end()) throw damaged("the reference is not listed under files");
        return found->second.sha256;
    }

    StateSpec parse_state(const nlohmann::json& entry) const {
        StateSpec state{parse_tensor_spec(entry), entry.at("initial")};
        const auto type = state.tensor.type;
        const nlohmann::json& initial = state.initial;
        if (state.tensor.shape.empty() || state.tensor.shape[0].free.empty()) {
            throw damaged("the state " + text(state.tensor) + " does not begin with the batch");
        }
        if (initial.is_string()) {
            inside(initial.get<std::string>());
        } else if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
            if (!initial.is_number() || !(std::abs(initial.get<double>()) <= 0x1p127)) {
                throw damaged("a state starts from " + initial.dump());
            }
        } else if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 || type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32) {
            const bool wide = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
            whole(initial, 0, wide ? std::int64_t{1} << 62 : (std::int64_t{1} << 31) - 1, "what a state starts from");
        } else {
            throw damaged("the state " + text(state.tensor) + " is not float32, int64 or int32");
        }
        return state;
    }

    /// Refuses graphs that take or give something else than graphs of their names do.
    void check_graphs() const {
        const std::size_t known = graphs.count("window") + graphs.count("stream") + graphs.count("prefill");
        if (graphs.empty() || graphs.size() != known || has("stream") == states.empty() ||
            (has("prefill") && (!has("stream") || frames.empty()))) {
            throw damaged("the graphs are not window, stream and prefill, or a part of them");
        }
        for (const auto& [name, graph] : graphs) {
            for (const TensorSpec& input : graph.inputs) {
                for (const Size& size : input.shape) {
                    if (!size.free.empty() && sizes.count(size.free) == 0) throw not_such(name);
                }
            }
            if (name != "window" && !carries_states(name, graph)) throw not_such(name);
        }
        if (has("prefill") && !takes_frames_of(graph("stream"), graph("prefill"))) throw not_such("prefill");
    }

    CheckError not_such(const std::string& name) const {
        return damaged("the " + name + " graph takes or gives other tensors than such a graph does");
    }

    /// Whether its last tensors are the states, and all are of the batch; what prefill takes is of frames then.
    bool carries_states(const std::string& name, const GraphSpec& graph) const {
        const Size batch = states[0].tensor.shape[0];
        const auto sized = [](const TensorSpec& tensor, const std::vector<Size>& first) {
            return tensor.shape.size() >= first.size() &&
                   std::equal(first.begin(), first.end(), tensor.shape.begin()) &&
                   std::all_of(tensor.shape.begin() + static_cast<std::ptrdiff_t>(first.size()), tensor.shape.end(),
                               [](const Size& size) { return size.free.empty(); });
        };
        const auto sound = [&](const std::vector<TensorSpec>& tensors, const std::vector<Size>& first,
                               const std::string& prefix) {
            const std::size_t own = tensors.size() - states.size();
            for (std::size_t i = 0; i < tensors.size(); ++i) {
                if (!sized(tensors[i], i < own ? first : std::vector<Size>{batch})) return false;
                if (i < own) continue;
                const TensorSpec& state = states[i - own].tensor;
                if (tensors[i].name != prefix + state.name || !tensors[i].is_like(state)) return false;
            }
            return true;
        };
        const std::vector<Size> one{batch}, several{batch, Size{0, frames}};
        return sound(graph.inputs, name == "prefill" ? several : one, "past.") && sound(graph.outputs, one, "present.");
    }

    /// Whether a prefill graph takes what a stream graph takes, with frames, and gives the same.
    static bool takes_frames_of(const GraphSpec& stream, const GraphSpec& prefill) {
        std::vector<TensorSpec> pieces = prefill.own_inputs();
        for (TensorSpec& each : pieces) each.shape.erase(each.shape.begin() + 1);
        const auto like = [](const std::vector<TensorSpec>& some, const std::vector<TensorSpec>& others) {
            return std::equal(some.begin(), some.end(), others.begin(), others.end(),
                              [](const TensorSpec& one, const TensorSpec& other) { return one.is_like(other); });
        };
        return like(stream.own_inputs(), pieces) && like(stream.own_outputs(), prefill.own_outputs());
    }

    GraphSpec parse_graph(const std::string& name, const nlohmann::json& entry) const {
        GraphSpec spec;
        spec.model = inside(entry.at("model").get<std::string>());
        for (const nlohmann::json& tensor : entry.at("inputs")) {
            spec.inputs.push_back(parse_tensor_spec(tensor));
            spec.inputs.back().values = parse_values(tensor.at("values"), spec.inputs.back());
        }
        for (const nlohmann::json& tensor : entry.at("outputs")) spec.outputs.push_back(parse_tensor_spec(tensor));
        spec.states = name == "window" ? 0 : states.size();
        if (std::min(spec.inputs.size(), spec.outputs.size()) <= spec.states) throw not_such(name);
        for (const nlohmann::json& folder : entry.at("test_data")) {
            spec.test_data.push_back(inside(folder.get<std::string>()));
        }
        if (spec.test_data.empty()) throw damaged("'" + spec.model + "' has no test data");
        for (const auto& [symbol, bounds] : entry.at("limits").items()) {
            Limits& limits = spec.limits[symbol];
            const std::string place = "a limit of " + symbol;
            limits.least = whole(bounds.at(0), 1, limits.most, place);
            if (!bounds.at(1).is_null()) limits.most = whole(bounds.at(1), limits.least, limits.most, place);
        }
        if (const nlohmann::json& sequence = entry.at("test_sequence"); !sequence.is_null()) {
            spec.test_sequence = inside(sequence.at("folder").get<std::string>());
        }
        return spec;
    }

    /// A whole number within bounds.
    std::int64_t whole(const nlohmann::json& entry, std::int64_t least, std::int64_t most,
                       const std::string& place) const {
        const std::int64_t number = entry.is_number_integer() ? entry.get<std::int64_t>() : least - 1;
        if (number < least || number > most) {
            throw damaged(place + " is " + entry.dump() + ", and not " + std::to_string(least) + " to " +
                          std::to_string(most));
        }
        return number;
    }

    Values parse_values(const nlohmann::json& entry, const TensorSpec& spec) const {
        Values values;
        values.kind = entry.at("kind").get<std::string>();
        const bool bounded = values.kind == "ids" || values.kind == "integers";
        const bool is_float =
            spec.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || spec.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
        const bool known = is_float ? values.kind == "normal" : bounded || values.kind == "mask";
        if (!known || entry.at("below").is_null() == bounded) {
            throw damaged("the values of " + text(spec) + " are " + entry.dump());
        }
        if (bounded) {
            values.below = whole(entry.at("below"), 1, std::int64_t{1} << 53, "what the values of an input are below");
        }
        if (!is_float) {
            constexpr double infinity = std::numeric_limits<double>::infinity();
            const bool ids = values.kind == "ids";
            values.least = ids ? 0 : -infinity;
            values.most = ids ? static_cast<double>(values.below - 1) : infinity;
        }
        return values;
    }

    TensorSpec parse_tensor_spec(const nlohmann::json& entry) const {
        TensorSpec spec;
        spec.name = entry.at("name").get<std::string>();
        const std::string dtype = entry.at("dtype").get<std::string>();
        const auto type =
            std::find_if(kTypes.begin(), kTypes.end(), [&](const Type& each) { return dtype == each.name; });
        if (type == kTypes.end()) throw damaged("'" + spec.name + "' holds '" + dtype + "', which no tensor does");
        spec.type = type->code;
        for (const nlohmann::json& size : entry.at("shape")) {
            const std::string place = "a size of '" + spec.name + "'";
            if (size == "") throw damaged(place + " is a text of no letters");
            spec.shape.push_back(size.is_string() ? Size{0, size.get<std::string>()}
                                                  : Size{whole(size, 1, std::int64_t{1} << 40, place), ""});
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

/// A place in a tensor, such as [0, 2].
inline std::string place_of(std::size_t index, const Shape& shape) {
    Shape place(shape.size());
    for (std::size_t axis = shape.size(); axis-- > 0; index /= static_cast<std::size_t>(shape[axis])) {
        place[axis] = static_cast<std::int64_t>(index % static_cast<std::size_t>(shape[axis]));
    }
    return text(place);
}

/// Refuses numbers that are not of an input's type and this shape, not finite, beyond kMaxMagnitude, or no ids.
inline void check_numbers(const TensorSpec& spec, const Numbers& given, const Shape& shape) {
    const Type &wanted = type_of(spec.type), &found = type_of(given.type);
    if (found.code != wanted.code) {
        throw RequestError(spec.name + " holds " + found.name + ", and the model takes " + wanted.name +
                           "; convert it");
    }
    if (given.size != count(shape)) {
        throw RequestError(spec.name + " has " + std::to_string(given.size) + " numbers, and the model takes " +
                           std::to_string(count(shape)) + " (" + wanted.name + " " + text(shape) +
                           "); give as many as its shape holds");
    }
    const Values& values = spec.values;
    with_type(spec.type, [&](auto zero) {
        const auto* const numbers = static_cast<const decltype(zero)*>(given.data);
        for (std::size_t i = 0; i < given.size; ++i) {
            const double number = to_double(numbers[i]);
            if (number >= values.least && number <= values.most) continue;  // a NaN is not
            char shown[32];
            std::snprintf(shown, sizeof shown, values.kind == "ids" ? "%.0f" : "%g", number);
            throw RequestError(spec.name + " holds " + shown + " at " + place_of(i, shape) + "; " +
                               (values.kind == "ids"
                                    ? "there are 0 to " + std::to_string(values.below - 1) + ", give those"
                                : std::isfinite(number)
                                    ? "numbers up to 1e12 are taken, beyond which float32 may overflow; scale or mend "
                                      "the input"
                                    : "give finite numbers only"));
        }
    });
}

/// Refuses a free size that is beyond its limits.
inline void check_limits(const GraphSpec& graph, const std::string& name, const std::string& symbol,
                         std::int64_t size) {
    const auto found = graph.limits.find(symbol);
    const Limits limits = found == graph.limits.end() ? Limits{} : found->second;
    if (size >= limits.least && size <= limits.most) return;
    throw RequestError(
        name + ": " + symbol + " is " + std::to_string(size) + ", and this model takes " +
        (size < limits.least ? std::to_string(limits.least) + " or more" : "at most " + std::to_string(limits.most)));
}

/// Refuses inputs that are not what a graph takes.
inline void check_inputs(const GraphSpec& graph, const std::vector<Input>& inputs) {
    if (inputs.size() != graph.inputs.size()) {
        throw RequestError("the model takes " + text(graph.inputs) + "; got " + std::to_string(inputs.size()) +
                           " inputs");
    }
    Sizes sizes;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
        const TensorSpec& spec = graph.inputs[i];
        const Shape& shape = inputs[i].shape;
        if (!std::equal(spec.shape.begin(), spec.shape.end(), shape.begin(), shape.end(),
                        [](const Size& size, std::int64_t found) {
                            return size.free.empty() ? size.number == found : found > 0;
                        })) {
            throw RequestError(spec.name + " has shape " + text(shape) + ", and the model takes " + text(spec) +
                               "; give that");
        }
        for (std::size_t axis = 0; axis < shape.size(); ++axis) {
            const std::string& symbol = spec.shape[axis].free;
            if (symbol.empty()) continue;
            const std::int64_t known = sizes.emplace(symbol, shape[axis]).first->second;
            if (known != shape[axis]) {
                throw RequestError(spec.name + ": " + symbol + " is " + std::to_string(shape[axis]) + ", and " +
                                   std::to_string(known) + " in what was given before; give the same everywhere");
            }
            check_limits(graph, spec.name, symbol, shape[axis]);
        }
        check_numbers(spec, inputs[i].numbers, shape);
    }
}

/// Refuses outputs that are not finite.
inline void check_finite(const std::vector<TensorSpec>& specs, const std::vector<Tensor>& outputs,
                         const char* consequence) {
    for (std::size_t i = 0; i < outputs.size(); ++i) {
        const bool finite = with_type(outputs[i].type(), [&](auto zero) {
            const auto* const numbers = outputs[i].data<decltype(zero)>();
            return std::all_of(numbers, numbers + outputs[i].size(),
                               [](auto number) { return std::isfinite(to_double(number)); });
        });
        if (finite) continue;
        throw CheckError(specs[i].name + " is not finite: float32 overflows in this model on these frames" +
                         consequence + "; scale them down, or mend the weights");
    }
}

/// A tensor that is no copy of these numbers, and is only read: they must outlive it.
inline Ort::Value view(const Numbers& numbers, const Shape& shape) {
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    return Ort::Value::CreateTensor(memory, const_cast<void*>(numbers.data), numbers.size * type_of(numbers.type).bytes,
                                    shape.data(), shape.size(), numbers.type);
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

    /// Runs the window graph on inputs in their order, and gives its outputs in theirs.
    std::vector<Tensor> operator()(const std::vector<Input>& inputs) { return call("window", inputs); }

    /// Runs the window graph on inputs by name, and gives its outputs by name.
    std::map<std::string, Tensor> run(const std::map<std::string, Input>& inputs) {
        const GraphSpec& graph = bundle_.graph("window");
        std::vector<Input> in_order;
        for (const TensorSpec& spec : graph.inputs) {
            const auto found = inputs.find(spec.name);
            if (found != inputs.end()) in_order.push_back(found->second);
        }
        if (in_order.size() != inputs.size() || in_order.size() != graph.inputs.size()) {
            std::string given;
            for (const auto& [name, input] : inputs) given += (given.empty() ? "" : ", ") + name;
            throw RequestError("the model takes " + text(graph.inputs) + "; got " +
                               (given.empty() ? "nothing" : given));
        }
        std::vector<Tensor> outputs = call("window", in_order);
        std::map<std::string, Tensor> named;
        for (std::size_t i = 0; i < outputs.size(); ++i) named.emplace(graph.outputs[i].name, std::move(outputs[i]));
        return named;
    }

    /// Runs any graph on all its inputs, states among them, in their order.
    std::vector<Tensor> call(const std::string& name, const std::vector<Input>& inputs) {
        const GraphSpec& graph = bundle_.graph(name);
        check_inputs(graph, inputs);
        std::vector<const char*> reads, gives;
        std::vector<Ort::Value> values;
        for (std::size_t i = 0; i < inputs.size(); ++i) {
            reads.push_back(graph.inputs[i].name.c_str());
            values.push_back(view(inputs[i].numbers, inputs[i].shape));
        }
        for (const TensorSpec& spec : graph.outputs) gives.push_back(spec.name.c_str());
        const auto held = session(name);
        std::vector<Tensor> outputs;
        try {
            for (Ort::Value& value : held->Run(Ort::RunOptions{nullptr}, reads.data(), values.data(), values.size(),
                                               gives.data(), gives.size())) {
                outputs.emplace_back(std::move(value));
            }
        } catch (const Ort::Exception& error) {
            std::string given;
            for (std::size_t i = 0; i < inputs.size(); ++i) {
                given += (i == 0 ? "" : ", ") + graph.inputs[i].name + " " + text(inputs[i].shape);
            }
            throw CheckError("ONNX Runtime failed on " + given + " with provider " + options_.provider + ": " +
                             error.what());
        }
        check_finite(graph.outputs, outputs, "");
        return outputs;
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
        const auto check = [&](const std::vector<TensorSpec>& specs, std::size_t found, auto name_of,
                               auto type_of_one) {
            bool same = specs.size() == found;
            for (std::size_t i = 0; same && i < found; ++i) {
                const auto type = type_of_one(i);
                same = type.GetONNXType() == ONNX_TYPE_TENSOR && specs[i].name == name_of(i).get();
                if (!same) break;
                const auto info = type.GetTensorTypeAndShapeInfo();
                const Shape shape = info.GetShape();
                same = specs[i].type == info.GetElementType() &&
                       std::equal(
                           specs[i].shape.begin(), specs[i].shape.end(), shape.begin(), shape.end(),
                           [](const Size& size, std::int64_t is) { return !size.free.empty() || size.number == is; });
            }
            if (!same) {
                throw CheckError("model " + text(path) + ": its tensors are not those in the manifest, " + text(specs) +
                                 "; build or copy the bundle again");
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
          step_(model.bundle().graph("stream")),
          outputs_(step_.own_outputs()),
          states_(model.bundle().states),
          session_(model.session("stream")),
          in_place_(model.options().provider == "cpu"),
          identity_(model.bundle().weights + " with batch " + std::to_string(batch)) {
        if (batch < 1) throw RequestError("batch is " + std::to_string(batch) + "; give 1 or more");
        if (history > 100'000) throw RequestError("history is " + std::to_string(history) + "; give at most 100000");
        const std::string& symbol = step_.inputs[0].shape[0].free;
        check_limits(step_, "a stream", symbol, batch);
        sizes_[symbol] = batch;
        if (model.bundle().has("prefill")) {
            prefill_ = model.bundle().graph("prefill");
            prefill_session_ = model.session("prefill");
            const auto found = prefill_.limits.find(model.bundle().frames);
            piece_ = std::max(piece_, model.bundle().window_size());
            if (found != prefill_.limits.end()) piece_ = std::min(piece_, found->second.most);
        }
        for (const TensorSpec& spec : step_.own_inputs()) frames_.push_back(allocate(spec));
        for (const TensorSpec& spec : outputs_) results_.push_back(allocate(spec));
        initial_ = allocate();
        write_initial(model.bundle());
        // Beside the history and the present, one that a run may fail on without harm to either.
        for (std::size_t i = 0; i < history + 2; ++i) slots_.push_back(allocate());
        for (std::size_t i = 0; i < slots_.size(); ++i) {
            bindings_.emplace_back(*session_);
            bind_inputs(bindings_[i], step_, frames_, slots_[i]);
            bind_outputs(bindings_[i], step_, slots_[after(i)]);
        }
        reset();
    }

    std::int64_t batch() const { return batch_; }
    std::size_t history() const { return history_; }

    /// By how many frames it can be rewound now.
    std::size_t rewindable() const { return rewindable_; }

    /// One frame on: the stream's inputs in their order, such as float32 [batch, embed_dim], to its outputs in theirs,
    /// such as [batch, hidden_size], which are good until the next call.
    template <class... Arrays>
    const std::vector<Tensor>& step(const Arrays&... inputs) {
        const std::array<Numbers, sizeof...(inputs)> given{Numbers(inputs)...};
        return advance(given.data(), given.size());
    }

    const std::vector<Tensor>& step(const std::vector<Numbers>& inputs) {
        return advance(inputs.data(), inputs.size());
    }

    /// Many frames on at once, any number: its inputs, such as [batch, frames, embed_dim], to the last outputs. To
    /// rewind, it is one frame.
    template <class... Arrays>
    const std::vector<Tensor>& prefill(std::int64_t frames, const Arrays&... inputs) {
        return prefill(frames, std::vector<Numbers>{Numbers(inputs)...});
    }

    const std::vector<Tensor>& prefill(std::int64_t frames, const std::vector<Numbers>& inputs) {
        if (prefill_session_ == nullptr) throw RequestError("the bundle has no prefill graph; use step");
        check_number_of(inputs.size());
        const std::string& symbol = prefill_.inputs[0].shape[1].free;
        if (frames < 1) throw RequestError("prefill: " + symbol + " is " + std::to_string(frames) + "; give 1 or more");
        Sizes sizes = sizes_;
        sizes[symbol] = frames;
        std::vector<Shape> shapes;
        for (std::size_t i = 0; i < inputs.size(); ++i) {
            shapes.push_back(prefill_.inputs[i].at(sizes));
            check_numbers(prefill_.inputs[i], inputs[i], shapes[i]);
        }
        // Any number of frames, in pieces. States between two of them are set aside: one that fails moves nothing.
        Slot between;
        if (frames > piece_) between = allocate();
        const Slot* past = &slots_[current_];
        for (std::int64_t start = 0; start < frames; start += piece_) {
            std::vector<Tensor> piece;
            for (std::size_t i = 0; i < inputs.size(); ++i) {
                piece.push_back(some_frames(inputs[i], shapes[i], start, std::min(piece_, frames - start)));
            }
            Ort::IoBinding binding(*prefill_session_);
            bind_inputs(binding, prefill_, piece, *past);
            bind_outputs(binding, prefill_, slots_[after(current_)]);
            run(*prefill_session_, binding, prefill_, piece, *past);
            if (frames - start <= piece_) break;
            copy_states(slots_[after(current_)].states, between.states);
            past = &between;
        }
        return go_on();
    }

    /// Back to before the first frame; there is nothing to rewind then.
    void reset() {
        copy_states(initial_.states, slots_[current_].states);
        slots_[current_].moment = next_moment();
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
            const char* bytes = static_cast<const char*>(slot.states[i].bytes());
            into.states_[i].assign(bytes, bytes + slot.states[i].byte_size());
        }
    }

    /// Goes to a snapshot of this stream, or of another of the same weights and batch. The history goes back with it
    /// where it holds that moment, and is forgotten otherwise.
    void restore(const Snapshot& mark) {
        bool same = mark.identity_ == identity_ && mark.states_.size() == states_.size();
        for (std::size_t i = 0; same && i < states_.size(); ++i) {
            same = mark.states_[i].size() == initial_.states[i].byte_size();
        }
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
            std::memcpy(slot.states[i].bytes(), mark.states_[i].data(), mark.states_[i].size());
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
        std::vector<Tensor> states;
        std::uint64_t moment = 0;  // no two states of a program have the same
    };

    static std::uint64_t next_moment() {
        static std::atomic<std::uint64_t> moments{0};
        return ++moments;
    }

    std::size_t after(std::size_t slot) const { return (slot + 1) % slots_.size(); }
    std::size_t before(std::size_t frames) const { return (current_ + slots_.size() - frames) % slots_.size(); }

    void check_number_of(std::size_t inputs) const {
        if (inputs == frames_.size()) return;
        throw RequestError("a stream takes " + text(step_.own_inputs()) + "; got " + std::to_string(inputs) +
                           " inputs");
    }

    const std::vector<Tensor>& advance(const Numbers* inputs, std::size_t how_many) {
        check_number_of(how_many);
        for (std::size_t i = 0; i < how_many; ++i) check_numbers(step_.inputs[i], inputs[i], frames_[i].shape());
        for (std::size_t i = 0; i < how_many; ++i) {
            std::memcpy(frames_[i].bytes(), inputs[i].data, frames_[i].byte_size());
        }
        run(*session_, bindings_[current_], step_, frames_, slots_[current_]);
        return go_on();
    }

    /// Writes results_, and the states after `past` to the slot after the current one.
    void run(Ort::Session& session, Ort::IoBinding& binding, const GraphSpec& graph, const std::vector<Tensor>& inputs,
             const Slot& past) {
        Slot& written = slots_[after(current_)];
        try {
            // Where the provider has a memory of its own, binding an input copies it there: once is not enough.
            if (!in_place_) bind_inputs(binding, graph, inputs, past);
            written.moment = next_moment();
            session.Run(Ort::RunOptions{nullptr}, binding);
        } catch (const Ort::Exception& error) {
            throw CheckError("ONNX Runtime failed on " + graph.inputs[0].name + " " + text(inputs[0].shape()) + ": " +
                             error.what());
        }
        check_finite(outputs_, results_, ", and the stream stays where it was");
    }

    const std::vector<Tensor>& go_on() {
        current_ = after(current_);
        rewindable_ = std::min(rewindable_ + 1, history_);
        return results_;
    }

    /// Of numbers [batch, frames, ...] a copy of some frames; of all, the numbers themselves.
    static Tensor some_frames(const Numbers& numbers, Shape shape, std::int64_t start, std::int64_t count) {
        if (count == shape[1]) return Tensor(view(numbers, shape));
        const std::size_t entries = static_cast<std::size_t>(shape[0]), frames = static_cast<std::size_t>(shape[1]);
        const std::size_t frame = numbers.size * type_of(numbers.type).bytes / (entries * frames);
        shape[1] = count;
        Tensor some(numbers.type, shape);
        const std::size_t bytes = some.byte_size() / entries;
        const char* from = static_cast<const char*>(numbers.data) + static_cast<std::size_t>(start) * frame;
        for (std::size_t entry = 0; entry < entries; ++entry, from += frames * frame) {
            std::memcpy(static_cast<char*>(some.bytes()) + entry * bytes, from, bytes);
        }
        return some;
    }

    static void bind_inputs(Ort::IoBinding& binding, const GraphSpec& graph, const std::vector<Tensor>& inputs,
                            const Slot& slot) {
        for (std::size_t i = 0; i < graph.inputs.size(); ++i) {
            const Tensor& tensor = i < inputs.size() ? inputs[i] : slot.states[i - inputs.size()];
            binding.BindInput(graph.inputs[i].name.c_str(), tensor.value());
        }
    }

    void bind_outputs(Ort::IoBinding& binding, const GraphSpec& graph, const Slot& slot) const {
        for (std::size_t i = 0; i < graph.outputs.size(); ++i) {
            const Tensor& tensor = i < results_.size() ? results_[i] : slot.states[i - results_.size()];
            binding.BindOutput(graph.outputs[i].name.c_str(), tensor.value());
        }
    }

    Tensor allocate(const TensorSpec& spec) const {
        const Shape shape = spec.at(sizes_);
        count(shape);  // which may be too large
        return {spec.type, shape};
    }

    Slot allocate() const {
        Slot slot;
        for (const StateSpec& state : states_) slot.states.push_back(allocate(state.tensor));
        return slot;
    }

    static void copy_states(const std::vector<Tensor>& from, std::vector<Tensor>& to) {
        for (std::size_t i = 0; i < from.size(); ++i) std::memcpy(to[i].bytes(), from[i].bytes(), from[i].byte_size());
    }

    /// The first state: each entry of the batch has the same.
    void write_initial(const Bundle& bundle) {
        for (std::size_t i = 0; i < states_.size(); ++i) {
            const auto& [spec, initial] = states_[i];
            Tensor& state = initial_.states[i];
            if (initial.is_string()) {
                const Tensor one = bundle.tensor(initial.get<std::string>());
                if (one.type() != spec.type || one.shape() != spec.at({{spec.shape[0].free, 1}})) {
                    throw CheckError("bundle " + text(bundle.path) + ": '" + initial.get<std::string>() + "' is " +
                                     type_of(one.type()).name + " " + text(one.shape()) +
                                     ", and should be one entry of the state " + text(spec) +
                                     "; build the bundle again");
                }
                char* to = static_cast<char*>(state.bytes());
                for (std::int64_t entry = 0; entry < batch_; ++entry, to += one.byte_size()) {
                    std::memcpy(to, one.bytes(), one.byte_size());
                }
            } else if (spec.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
                std::fill_n(state.data<float>(), state.size(), initial.get<float>());
            } else if (spec.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64) {
                std::fill_n(state.data<std::int64_t>(), state.size(), initial.get<std::int64_t>());
            } else {
                std::fill_n(state.data<std::int32_t>(), state.size(), initial.get<std::int32_t>());
            }
        }
    }

    std::int64_t batch_, piece_ = 1024;  // frames of a prefill that are computed at once, unless the window is longer
    std::size_t history_;
    GraphSpec step_, prefill_;
    std::vector<TensorSpec> outputs_;
    std::vector<StateSpec> states_;
    std::shared_ptr<Ort::Session> session_, prefill_session_;  // the latter null without such a graph
    bool in_place_;
    std::string identity_;
    Sizes sizes_;                           // of the batch
    std::vector<Tensor> frames_, results_;  // what the bindings read and write
    Slot initial_;
    std::vector<Slot> slots_;
    std::vector<Ort::IoBinding> bindings_;  // the i-th reads slot i and writes the one after it
    std::size_t current_ = 0, rewindable_ = 0;
};

}  // namespace edifice
