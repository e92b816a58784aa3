// What scripts that check the JavaScript library end with where it does not keep a promise.

export function ensure(condition, what) {
  if (condition) return;
  console.error(`failed: ${what}`);
  process.exit(1);
}

/** Of a kind of error the check that a job is refused by it, in words that hold others; `kind` is for other kinds. */
export const refusing = (usual) => async (job, says, kind = usual) => {
  try {
    await job();
  } catch (error) {
    ensure(error instanceof kind && error.message.includes(says), `refuses with '${says}', got ${error}`);
    return;
  }
  ensure(false, `refuses with '${says}'`);
};
