// Shapes of tensors: in numbers, and as a manifest has them, with symbols.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "errors.hpp"

namespace edifice {

using Shape = std::vector<std::int64_t>;
using Sizes = std::map<std::string, std::int64_t>;  // what symbols stand for

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

constexpr const char* kPast = "past";  // the free size of states that grow: the frames that a stream has seen

/// How many numbers a tensor of this shape holds; none, of a state that grows and has not yet.
inline std::size_t count(const Shape& shape) {
    constexpr std::int64_t most = std::int64_t{1} << 40;
    std::int64_t product = 1;
    for (const std::int64_t size : shape) {
        if (size < 0 || (size > 0 && product > most / size)) {
            throw RequestError("shape " + text(shape) + " is negative or too large; give fewer");
        }
        product *= size;
    }
    return static_cast<std::size_t>(product);
}

}  // namespace edifice
