// Refusal of what a graph does not take, and of what it should not give.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "errors.hpp"
#include "graph.hpp"
#include "shape.hpp"
#include "tensor.hpp"

namespace edifice {

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
                            return size.free.empty() ? size.number == found : found > (size.free == kPast ? -1 : 0);
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
            if (symbol != kPast) check_limits(graph, spec.name, symbol, shape[axis]);
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

}  // namespace edifice
