// What can go wrong, by exit status. Every message says what was asked, what was found and what to do.

/**
 * Text that may come from a file of anybody's, as a terminal or a page may be given it: nothing in it moves the cursor,
 * hides or reorders text; letters of any script stay as they are. In JSON it is the same text.
 */
export function printable(text) {
  const escape = (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, '0')}`;
  return text.replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (letter) => letter.split('').map(escape).join(''));
}

/** An error that is for the user to read; `status` is what a program should exit with. */
export class EdificeError extends Error {
  constructor(message, status) {
    super(printable(message.replace(/\s+/g, ' ').trim())); // ONNX Runtime's own messages have several lines
    this.name = new.target.name;
    this.status = status;
  }
}

/** The bundle is damaged, or what was computed is wrong. */
export class CheckError extends EdificeError {
  constructor(message) {
    super(message, 1);
  }
}

/** What was asked for can't be had. */
export class RequestError extends EdificeError {
  constructor(message) {
    super(message, 2);
  }
}
