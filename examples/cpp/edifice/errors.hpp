// What all of the other headers throw, and text that a terminal may be given.
#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <stdexcept>
#include <string>

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

/// A path as UTF-8, for messages.
inline std::string text(const std::filesystem::path& path) {
    const auto utf8 = path.u8string();  // of char8_t from C++20 on
    return std::string(utf8.begin(), utf8.end());
}

}  // namespace edifice
