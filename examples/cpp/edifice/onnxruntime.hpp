// ONNX Runtime's C++ API, also on MinGW.
#pragma once

#if defined(__MINGW32__) && !defined(_Return_type_success_)
#define _Return_type_success_(success)  // an annotation of Microsoft's, which MinGW's headers lack
#endif
#include <onnxruntime_cxx_api.h>
