// Runs bundles of edifice-export with ONNX Runtime: C++17, needs nlohmann/json besides. This header has all of edifice/:
//
//   Bundle    manifest.json, and files whose size and SHA-256 are checked before they are used
//   Model     window graph: all frames, or whatever else a module takes, at once
//   Stream    stream and prefill graphs: one frame at a time, with a state to save, restore and rewind
//   Tensor    what they give: numbers of float, Ort::Float16_t, std::int64_t, std::int32_t or bool
//
// Errors are exceptions. Calls that are refused change nothing.
#pragma once

#include "edifice/bundle.hpp"
#include "edifice/checks.hpp"
#include "edifice/errors.hpp"
#include "edifice/graph.hpp"
#include "edifice/manifest.hpp"
#include "edifice/model.hpp"
#include "edifice/runtime.hpp"
#include "edifice/sha256.hpp"
#include "edifice/shape.hpp"
#include "edifice/states.hpp"
#include "edifice/stream.hpp"
#include "edifice/tensor.hpp"
#include "edifice/tensor_file.hpp"
