// Numbers of five types: the caller's, and those that a graph gives.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "onnxruntime.hpp"
#include "shape.hpp"

namespace edifice {

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

/// A tensor that is no copy of these numbers, and is only read: they must outlive it.
inline Ort::Value view(const Numbers& numbers, const Shape& shape) {
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    return Ort::Value::CreateTensor(memory, const_cast<void*>(numbers.data), numbers.size * type_of(numbers.type).bytes,
                                    shape.data(), shape.size(), numbers.type);
}

/// Copies bytes, of which there may be none, and then no place either.
inline void copy_bytes(void* to, const void* from, std::size_t size) {
    if (size != 0) std::memcpy(to, from, size);
}

}  // namespace edifice
