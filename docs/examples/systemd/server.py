#!/usr/bin/env python3
"""A service that knows nothing of ghostpool: it finds its files by LISTEN_FDS, sd_listen_fds(3).

It says what it has and adds a line to those that it may write to, then waits to be ended.
"""

import fcntl
import os
import signal


def listen_fds() -> dict[str, int]:
    """Descriptors that were passed to this process, by name; not inherited any further."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return {}
    names = os.environ["LISTEN_FDNAMES"].split(":")
    found = {name: fd for fd, name in enumerate(names, 3)}
    for fd in found.values():
        os.set_inheritable(fd, False)
    return found


def main() -> None:
    """Until SIGTERM."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    for name, fd in listen_fds().items():
        print(f"{name}: {os.fstat(fd).st_size} bytes", flush=True)
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
            os.write(fd, f"started as process {os.getpid()}\n".encode())
    print("ready", flush=True)
    signal.sigwait([signal.SIGTERM])


if __name__ == "__main__":
    main()
