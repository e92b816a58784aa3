// A bundle on disk: its manifest, and files whose size and SHA-256 are checked before they are used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <ios>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "errors.hpp"
#include "graph.hpp"
#include "manifest.hpp"
#include "sha256.hpp"
#include "tensor.hpp"
#include "tensor_file.hpp"

namespace edifice {

/// A bundle on disk. Nothing in it is trusted before it was checked.
class Bundle : public Manifest {
public:
    /// Reads the manifest. Files are checked when they are used, or all by check_files().
    explicit Bundle(std::filesystem::path folder)
        : Manifest(place(folder), manifest_of(folder)), path(std::move(folder)) {
        for (const auto& [name, file] : files) check_length(path, name);
    }

    std::filesystem::path path;

    /// Frames that the model was made for at once; 1 where there are no frames.
    std::int64_t window_size() const { return frames.empty() ? 1 : sizes.at(frames); }

    const GraphSpec& graph(const std::string& name) const {
        const auto found = graphs.find(name);
        if (found != graphs.end()) return found->second;
        std::string remedy = "build it with --graph both";
        if (is_module && name == "stream") {
            remedy = "its module has no step(*frame, state) and initial_state(batch); give it both and export it again";
        }
        if (is_module && name == "prefill") remedy = "use step";
        throw RequestError(place(path) + "has no " + name + " graph; " + remedy);
    }

    /// Where a file is, once it was found to have the size and SHA-256 of the manifest.
    std::filesystem::path checked(const std::string& name) const {
        const auto found = files.find(name);
        if (found == files.end()) throw damaged("'" + name + "' is used and not listed under files");
        check(name, found->second);
        return place_in(path, name);
    }

    /// Where a model is, checked with the file of its weights. It names the files that it reads itself, so nothing is
    /// beside it that the manifest doesn't list.
    std::filesystem::path checked_model(const GraphSpec& graph) const {
        const std::filesystem::path model = checked(graph.model);
        const std::filesystem::path folder = model.parent_path();
        const std::string place = graph.model.substr(0, graph.model.rfind('/') + 1);
        for (const auto& entry : std::filesystem::recursive_directory_iterator(folder)) {
            // Not lexically_relative, which knows no paths that begin with \\?\.
            const std::filesystem::path below = entry.path().native().substr(folder.native().size() + 1);
            const auto utf8 = below.generic_u8string();
            const std::string file = place + std::string(utf8.begin(), utf8.end());
            if (entry.is_directory() || file == "manifest.json" || is_of_browser(entry.path().filename())) continue;
            if (files.count(file) == 0) throw damaged("'" + file + "' is beside a model and not listed under files");
        }
        if (graph.weights) checked(*graph.weights);
        return model;
    }

    void check_files() const {
        for (const auto& [name, file] : files) check(name, file);
    }

    Tensor tensor(const std::string& name) const {
        checked(name);
        return parse_tensor(load(path, name), text(place_in(path, name)));
    }

private:
    /// What browsers of files leave in folders that they show, and no part of a bundle.
    static bool is_of_browser(const std::filesystem::path& name) {
        return name == "Thumbs.db" || name == "desktop.ini" || name == ".DS_Store";
    }

    /// A file of a folder. Windows takes no other separators than its own in paths that begin with \\?\.
    static std::filesystem::path place_in(const std::filesystem::path& folder, const std::string& name) {
        return (folder / name).make_preferred();
    }

    /// Refuses what Windows can't open or, of a model, what a compiler's library lists another folder in place of.
    static void check_length(const std::filesystem::path& folder, const std::string& name) {
#ifdef _WIN32
        constexpr std::size_t most = 259;
        const std::size_t length = std::filesystem::absolute(place_in(folder, name)).native().size();
        if (length > most) {
            throw RequestError(place(folder) + "the path of '" + name + "' has " + std::to_string(length) +
                               " characters, and Windows takes " + std::to_string(most) +
                               "; move the bundle to a shorter one");
        }
#else
        static_cast<void>(folder), static_cast<void>(name);
#endif
    }

    static std::string place(const std::filesystem::path& folder) { return "bundle " + text(folder) + ": "; }

    static std::string manifest_of(const std::filesystem::path& folder) {
        check_length(folder, "manifest.json");
        if (!std::filesystem::is_directory(folder)) {
            throw RequestError(place(folder) + "no such folder; name a bundle's");
        }
        if (!std::filesystem::is_regular_file(folder / "manifest.json")) {
            throw RequestError(place(folder) + "has no manifest.json, so it is not a bundle; name a bundle's folder");
        }
        return load(folder, "manifest.json");
    }

    static std::string load(const std::filesystem::path& folder, const std::string& name) {
        std::ifstream file(place_in(folder, name), std::ios::binary);
        std::string bytes{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
        if (!file) throw CheckError(place(folder) + "'" + name + "' can't be read; check its rights");
        return bytes;
    }

    void check(const std::string& name, const File& expected) const {
        if (!std::filesystem::is_regular_file(place_in(path, name))) {
            throw CheckError(place(path) + "'" + name + "' is missing; build or copy the bundle again");
        }
        std::ifstream file(place_in(path, name), std::ios::binary);
        std::vector<char> piece(1 << 16);
        Sha256 hash;
        std::uint64_t size = 0;
        while (file.read(piece.data(), static_cast<std::streamsize>(piece.size())), file.gcount() > 0) {
            hash.update(piece.data(), static_cast<std::size_t>(file.gcount()));
            size += static_cast<std::uint64_t>(file.gcount());
        }
        if (!file.eof()) throw CheckError(place(path) + "'" + name + "' can't be read; check its rights");
        const std::string found = hash.hex();
        if (found != expected.sha256) {
            throw CheckError(place(path) + "'" + name + "' was changed: its SHA-256 is " + found.substr(0, 12) +
                             "..., the manifest says " + expected.sha256.substr(0, 12) +
                             "...; build or copy the bundle again");
        }
        if (size != expected.size) {
            throw damaged("'" + name + "' has " + std::to_string(size) + " bytes, and should have " +
                          std::to_string(expected.size));
        }
    }
};

}  // namespace edifice
