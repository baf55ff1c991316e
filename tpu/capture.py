"""What C++ says: warnings of XLA and libtpu, which Python's own redirection does not reach."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator


class Said:
    """text: all of it, once the block is left."""

    text = ""


@contextlib.contextmanager
def standard_error() -> Iterator[Said]:
    """What C++ writes to standard error, where Python's own redirection does not reach."""
    said = Said()
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            file.seek(0)
            said.text = file.read().decode(errors="replace")
