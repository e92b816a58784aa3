// A bundle's stream and prefill graphs: one frame at a time, with a state to save, restore and rewind.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "checks.hpp"
#include "errors.hpp"
#include "graph.hpp"
#include "model.hpp"
#include "onnxruntime.hpp"
#include "shape.hpp"
#include "states.hpp"
#include "tensor.hpp"

namespace edifice {

/// A number of streams side by side, frame by frame. One thread at a time; others may have their own of one Model.
///
/// The states are in a ring of buffer sets. A step reads one set and writes the next, so nothing is updated in place,
/// and rewind only moves an index. After the constructor, step allocates nothing beyond what ONNX Runtime does in a
/// run, and room for states that grow.
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
          grows_(std::any_of(states_.begin(), states_.end(), [](const StateSpec& state) { return state.grows(); })),
          identity_(model.bundle().weights + " with batch " + std::to_string(batch)) {
        if (batch < 1) throw RequestError("batch is " + std::to_string(batch) + "; give 1 or more");
        if (history > 100'000) throw RequestError("history is " + std::to_string(history) + "; give at most 100000");
        const std::string& symbol = step_.inputs[0].shape[0].free;
        check_limits(step_, "a stream", symbol, batch);
        sizes_[symbol] = batch;
        sizes_[kPast] = 0;
        if (model.bundle().has("prefill")) {
            prefill_ = model.bundle().graph("prefill");
            prefill_session_ = model.session("prefill");
            const auto found = prefill_.limits.find(model.bundle().frames);
            piece_ = std::max(piece_, model.bundle().window_size());
            if (found != prefill_.limits.end()) piece_ = std::min(piece_, found->second.most);
        }
        for (const TensorSpec& spec : step_.own_inputs()) frames_.push_back(allocate(spec, sizes_));
        for (const TensorSpec& spec : outputs_) results_.push_back(allocate(spec, sizes_));
        initial_ = allocate(states_, sizes_);
        write_initial(model.bundle(), batch, initial_);
        // Beside the history and the present, one that a run may fail on without harm to either.
        for (std::size_t i = 0; i < history + 2; ++i) slots_.push_back(allocate(states_, sizes_));
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
        if (frames > piece_) between = allocate(states_, sizes_);
        const Slot* past = &slots_[current_];
        for (std::int64_t start = 0; start < frames; start += piece_) {
            const std::int64_t taken = std::min(piece_, frames - start);
            std::vector<Tensor> piece;
            for (std::size_t i = 0; i < inputs.size(); ++i) {
                piece.push_back(some_frames(inputs[i], shapes[i], start, taken));
            }
            Ort::IoBinding binding(*prefill_session_);
            bind_inputs(binding, prefill_, piece, *past);
            bind_outputs(binding, prefill_, slots_[after(current_)]);
            run(*prefill_session_, binding, prefill_, piece, *past, taken);
            if (frames - start <= piece_) break;
            grow(between, slots_[after(current_)].past);
            copy_states(slots_[after(current_)], between);
            past = &between;
        }
        return go_on();
    }

    /// Back to before the first frame; there is nothing to rewind then.
    void reset() {
        grow(slots_[current_], 0);
        copy_states(initial_, slots_[current_]);
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
        into.past_ = slot.past;
        into.states_.resize(slot.states.size());
        for (std::size_t i = 0; i < slot.states.size(); ++i) {
            const char* bytes = static_cast<const char*>(slot.states[i].bytes());
            into.states_[i].assign(bytes, bytes + slot.states[i].byte_size());
        }
    }

    /// Goes to a snapshot of this stream, or of another of the same weights and batch. The history goes back with it
    /// where it holds that moment, and is forgotten otherwise.
    void restore(const Snapshot& mark) {
        if (mark.identity_ != identity_) {
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
        grow(slot, mark.past_);
        for (std::size_t i = 0; i < slot.states.size(); ++i) {
            copy_bytes(slot.states[i].bytes(), mark.states_[i].data(), mark.states_[i].size());
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
        run(*session_, bindings_[current_], step_, frames_, slots_[current_], 1);
        return go_on();
    }

    void grow(Slot& slot, std::int64_t past) const {
        if (grows_) edifice::grow(slot, states_, sizes_, past);
    }

    /// Writes results_, and the states after `past` and so many frames to the slot after the current one.
    void run(Ort::Session& session, Ort::IoBinding& binding, const GraphSpec& graph, const std::vector<Tensor>& inputs,
             const Slot& past, std::int64_t frames) {
        Slot& written = slots_[after(current_)];
        try {
            // Where the provider has a memory of its own, binding an input copies it there: once is not enough.
            if (!in_place_ || grows_) bind_inputs(binding, graph, inputs, past);
            if (grows_) {
                grow(written, past.past + frames);
                bind_outputs(binding, graph, written);
            }
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

    std::int64_t batch_, piece_ = 1024;  // frames of a prefill that are computed at once, unless the window is longer
    std::size_t history_;
    GraphSpec step_, prefill_;
    std::vector<TensorSpec> outputs_;
    std::vector<StateSpec> states_;
    std::shared_ptr<Ort::Session> session_, prefill_session_;  // the latter null without such a graph
    bool in_place_, grows_;
    std::string identity_;
    Sizes sizes_;                           // of the batch
    std::vector<Tensor> frames_, results_;  // what the bindings read and write
    Slot initial_;
    std::vector<Slot> slots_;
    std::vector<Ort::IoBinding> bindings_;  // the i-th reads slot i and writes the one after it
    std::size_t current_ = 0, rewindable_ = 0;
};

}  // namespace edifice
