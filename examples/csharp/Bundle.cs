using System;
using System.Collections.Generic;
using System.IO;
using System.Linq;
using System.Security.Cryptography;
using System.Text.Json;

namespace Edifice
{
    /// <summary>
    /// A folder that edifice-export wrote. The manifest is not trusted: its paths stay in the folder, and a file is
    /// compared with its SHA-256 before it is used.
    /// </summary>
    public sealed class Bundle
    {
        public const int SchemaVersion = 6;

        /// <summary>What browsers of files leave in folders that they show, and no part of a bundle.</summary>
        private static readonly string[] OfBrowsers = { "Thumbs.db", "desktop.ini", ".DS_Store" };

        private readonly Manifest manifest;

        private Bundle(string folder, JsonElement content)
        {
            (Folder, manifest) = (folder, new Manifest(folder, content));
        }

        public string Folder { get; }

        /// <summary>The architecture, or the class of the module, that the graphs compute.</summary>
        public string Name => manifest.Name;

        /// <summary>Of each free size by its symbol, what the graphs are made for; they are right for all.</summary>
        public IReadOnlyDictionary<string, int> Sizes => manifest.Sizes;

        /// <summary>The symbol of frames, which a stream goes through one by one; null where there are none.</summary>
        public string? Frames => manifest.Frames;

        /// <summary>Frames in one window; 1 where there are no frames.</summary>
        public int WindowSize => manifest.WindowSize;

        /// <summary>What tells the states of one bundle from those of another: the name and the weights.</summary>
        public string Identity => $"{manifest.Kind} {Name} with weights {manifest.Weights}";

        public IReadOnlyList<StateSpec> States => manifest.States;

        /// <summary>The graphs that the bundle has of window, stream and prefill.</summary>
        public IEnumerable<string> Graphs => manifest.Graphs.Keys;

        /// <exception cref="DirectoryNotFoundException">There is no such folder.</exception>
        /// <exception cref="FileNotFoundException">The folder is not a bundle.</exception>
        /// <exception cref="NotSupportedException">The bundle has a schema that this program does not read.</exception>
        /// <exception cref="InvalidDataException">The manifest is damaged.</exception>
        public static Bundle Open(string folder)
        {
            if (!Directory.Exists(folder))
            {
                throw new DirectoryNotFoundException(
                    $"bundle {folder}: no such folder; make a bundle with `edifice-export build`");
            }
            string path = Path.Combine(folder, "manifest.json");
            if (!File.Exists(path))
            {
                throw new FileNotFoundException(
                    $"bundle {folder}: has no manifest.json; name a folder that `edifice-export build` wrote");
            }
            try
            {
                using JsonDocument content = JsonDocument.Parse(File.ReadAllBytes(path));
                return new Bundle(folder, content.RootElement);
            }
            catch (Exception error) when (
                error is JsonException || error is InvalidOperationException || error is FormatException)
            {
                throw new InvalidDataException(
                    $"bundle {folder}: manifest.json is damaged: {error.Message}; build or copy the bundle again",
                    error);
            }
        }

        public bool Has(string graph) => manifest.Graphs.ContainsKey(graph);

        /// <exception cref="NotSupportedException">The bundle was built without this graph.</exception>
        public GraphSpec Graph(string name)
        {
            if (manifest.Graphs.TryGetValue(name, out GraphSpec? graph))
            {
                return graph;
            }
            string advice = manifest.Kind == "module" ? "its module has none" : "build it with `--graph both`";
            throw new NotSupportedException(
                $"bundle {Folder}: has no {name} graph, only {string.Join(" and ", Graphs)}; {advice}");
        }

        /// <summary>Compares a file with the manifest, and says where it is.</summary>
        /// <exception cref="InvalidDataException">It is missing, or was changed.</exception>
        public string Check(string name)
        {
            (long size, string sha256) = manifest.Files[manifest.Listed(name)];
            string path = Path.Combine(Folder, name.Replace('/', Path.DirectorySeparatorChar));
            if (!File.Exists(path))
            {
                throw new InvalidDataException(
                    $"bundle {Folder}: '{name}' is missing; build or copy the bundle again");
            }
            using FileStream stream = File.OpenRead(path);
            using SHA256 algorithm = SHA256.Create();
            string found = BitConverter.ToString(algorithm.ComputeHash(stream)).Replace("-", "").ToLowerInvariant();
            if (stream.Length != size || found != sha256)
            {
                throw new InvalidDataException(
                    $"bundle {Folder}: '{name}' was changed: its SHA-256 is {found} ({stream.Length} bytes), the "
                    + $"manifest says {sha256} ({size} bytes); build or copy the bundle again");
            }
            return path;
        }

        /// <summary>Compares every file with the manifest.</summary>
        public void CheckAll()
        {
            foreach (string name in manifest.Files.Keys)
            {
                Check(name);
            }
        }

        /// <summary>
        /// Compares a model with the manifest, and the file of its weights. A model names the files that it reads
        /// itself, so nothing is beside it that the manifest doesn't list.
        /// </summary>
        public string CheckModel(GraphSpec graph)
        {
            string place = graph.Model.Substring(0, graph.Model.LastIndexOf('/') + 1);
            string beside = Path.Combine(Folder, place);
            if (Directory.Exists(beside))
            {
                foreach (string path in Directory.EnumerateFiles(beside, "*", SearchOption.AllDirectories))
                {
                    string name = Path.GetRelativePath(Folder, path).Replace(Path.DirectorySeparatorChar, '/');
                    bool known = name == "manifest.json" || OfBrowsers.Contains(Path.GetFileName(path));
                    if (!known && !manifest.Files.ContainsKey(name))
                    {
                        throw manifest.Damaged($"'{name}' is beside a model and not listed under files");
                    }
                }
            }
            if (graph.Weights != null)
            {
                Check(graph.Weights);
            }
            return Check(graph.Model);
        }
    }
}
