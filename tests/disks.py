"Small file systems for tests of full and read-only disks."
import contextlib
import subprocess

import pytest


@contextlib.contextmanager
def disk(folder, size, options=""):
    "A small file system of its own at a folder; the test is skipped, saying so, where none can be mounted."
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode: pytest.skip(f"no file system can be mounted here ({done.stderr.strip()})")
    try: yield folder
    finally: subprocess.run(["umount", "-l", folder], check=True)


def remount(folder, options): subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)
