// A reader of a bundle's folder for Bundle.open.

import { readFile, readdir, realpath, stat } from 'node:fs/promises';
import path from 'node:path';

import { CheckError, RequestError } from '../javascript/edifice.mjs';

/** @returns {Promise<(name: string) => Promise<Uint8Array | null>>} */
export async function openFolder(folder) {
  let root;
  try {
    root = await realpath(folder);
    if (!(await stat(root)).isDirectory()) throw new RequestError(`bundle ${folder}: is a file; name the folder`);
  } catch (error) {
    if (error instanceof RequestError) throw error;
    throw new RequestError(`bundle ${folder}: no such folder (${error.code}); make one with \`edifice-export build\``);
  }
  const read = async (name) => {
    try {
      const file = await realpath(path.join(root, name));
      if (!file.startsWith(root + path.sep)) {
        throw new CheckError(`bundle ${folder}: '${name}' leaves the bundle through a link; copy the bundle again`);
      }
      return await readFile(file);
    } catch (error) {
      if (['ENOENT', 'ENOTDIR', 'EISDIR'].includes(error.code)) return null;
      if (error instanceof CheckError) throw error;
      throw new RequestError(`bundle ${folder}: '${name}' can't be read (${error.code}); check its rights`);
    }
  };
  const place = (name) => path.join(root, name);
  const beside = async (name) => {
    const entries = await readdir(path.dirname(place(name)), { recursive: true, withFileTypes: true });
    const files = entries.filter((entry) => !entry.isDirectory());
    return files.map((entry) => path.relative(root, path.join(entry.parentPath, entry.name)).replaceAll(path.sep, '/'));
  };
  return Object.assign(read, { place, beside });
}
