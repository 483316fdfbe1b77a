"""Starts a server and passes on what it writes, unless a line grows beyond a size.

    python stdio_guard.py BYTES COMMAND [ARGUMENT …]

A client that reads line by line would keep an endless line in memory. The server reads the
standard input itself. This runs as a file, without the package, so that it starts at once.
"""

import os
import subprocess
import sys

_BLOCK = 2**16


def main(arguments: list[str]) -> int:
    """Runs the command until it ends, or writes too long a line.

    Args:
      arguments: the limit in bytes, then the command.
    """
    limit, command = int(arguments[0]), arguments[1:]
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0)
    except OSError:
        return 127
    assert process.stdout is not None
    pending = 0
    try:
        while block := os.read(process.stdout.fileno(), _BLOCK):
            first = block.find(b"\n")
            if pending + (len(block) if first < 0 else first) > limit:
                return 1
            pending = pending + len(block) if first < 0 else len(block) - 1 - block.rfind(b"\n")
            view = memoryview(block)
            while view:
                view = view[os.write(1, view):]
        return process.wait()
    except BrokenPipeError:  # nobody listens any more
        return 1
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
