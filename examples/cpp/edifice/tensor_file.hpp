// Tensors in files.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "errors.hpp"
#include "shape.hpp"
#include "tensor.hpp"

namespace edifice {

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
    const bool empty = std::find(shape.begin(), shape.end(), 0) != shape.end();
    std::size_t expected = empty ? 0 : type->bytes;
    for (const std::int64_t each : shape) {
        if (each < 0 || (!empty && expected > size / static_cast<std::size_t>(each)))
            throw damaged("has another size than its shape");
        expected *= static_cast<std::size_t>(each);
    }
    if (expected != size) throw damaged("has another size than its shape");
    const bool is_bool = type->code == ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
    if (is_bool && std::any_of(raw, end, [](char byte) { return byte != 0 && byte != 1; })) {
        throw damaged("holds truths that are not 0 or 1");
    }
    Tensor tensor(type->code, shape);
    copy_bytes(tensor.bytes(), raw, size);
    return tensor;
}

}  // namespace edifice
