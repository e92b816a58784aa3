// What graphs take, give and carry.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "onnxruntime.hpp"
#include "shape.hpp"
#include "tensor.hpp"

namespace edifice {

constexpr double kMaxMagnitude = 1e12;  // of floats that models take, which may square them: verified up to here

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

    /// Whether it is longer after every frame, as keys and values of full attention are.
    bool grows() const {
        return std::any_of(tensor.shape.begin(), tensor.shape.end(), [](const Size& size) { return size.free == kPast; });
    }
};

/// The least and the most that a free size may be.
struct Limits {
    std::int64_t least = 1, most = std::numeric_limits<std::int64_t>::max();
};

struct GraphSpec {
    std::string model;
    std::optional<std::string> weights;        // a file beside it; none if it has them itself
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

}  // namespace edifice
