// States of a stream: their buffers, and copies of them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "bundle.hpp"
#include "errors.hpp"
#include "graph.hpp"
#include "onnxruntime.hpp"
#include "shape.hpp"
#include "tensor.hpp"

namespace edifice {

/// Buffers of all states at one moment.
struct Slot {
    std::vector<Tensor> states;
    std::uint64_t moment = 0;  // no two states of a program have the same
    std::int64_t past = 0;     // frames that states which grow are of
};

inline Tensor allocate(const TensorSpec& spec, const Sizes& sizes) {
    const Shape shape = spec.at(sizes);
    count(shape);  // which may be too large
    return {spec.type, shape};
}

/// Room for all states at one moment.
inline Slot allocate(const std::vector<StateSpec>& states, const Sizes& sizes) {
    Slot slot;
    for (const StateSpec& state : states) slot.states.push_back(allocate(state.tensor, sizes));
    return slot;
}

/// Makes room for what a slot holds after so many frames; what states that grow held in it is lost.
inline void grow(Slot& slot, const std::vector<StateSpec>& states, Sizes sizes, std::int64_t past) {
    if (slot.past == past) return;
    sizes[kPast] = slot.past = past;
    for (std::size_t i = 0; i < states.size(); ++i) {
        if (states[i].grows()) slot.states[i] = allocate(states[i].tensor, sizes);
    }
}

/// Copies states to a slot that has the room.
inline void copy_states(const Slot& from, Slot& to) {
    for (std::size_t i = 0; i < from.states.size(); ++i) {
        copy_bytes(to.states[i].bytes(), from.states[i].bytes(), from.states[i].byte_size());
    }
}

/// The first states: each entry of the batch has the same.
inline void write_initial(const Bundle& bundle, std::int64_t batch, Slot& slot) {
    for (std::size_t i = 0; i < bundle.states.size(); ++i) {
        const auto& [spec, initial] = bundle.states[i];
        Tensor& state = slot.states[i];
        if (initial.is_string()) {
            const Tensor one = bundle.tensor(initial.get<std::string>());
            if (one.type() != spec.type || one.shape() != spec.at({{spec.shape[0].free, 1}})) {
                throw CheckError("bundle " + text(bundle.path) + ": '" + initial.get<std::string>() + "' is " +
                                 type_of(one.type()).name + " " + text(one.shape()) +
                                 ", and should be one entry of the state " + text(spec) +
                                 "; build the bundle again");
            }
            char* to = static_cast<char*>(state.bytes());
            for (std::int64_t entry = 0; entry < batch; ++entry, to += one.byte_size()) {
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

/// Of numbers [batch, frames, ...] a copy of some frames; of all, the numbers themselves.
inline Tensor some_frames(const Numbers& numbers, Shape shape, std::int64_t start, std::int64_t count) {
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

/// A state of a stream, copied. To take the next one into the same object allocates nothing.
class Snapshot {
    friend class Stream;
    std::string identity_;
    std::uint64_t moment_ = 0;
    std::int64_t past_ = 0;
    std::vector<std::vector<char>> states_;
};

}  // namespace edifice
