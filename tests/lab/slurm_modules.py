"""Modules of a cluster's own, for Debian's environment-modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

PACKAGES = {"modulecmd": "environment-modules"}
CUDA = """#%Module1.0
setenv CUDA_HOME /opt/cuda-12
setenv OMP_NUM_THREADS 1
prepend-path PATH {bin}
"""


def modulefiles(folder: Path) -> Path:
    """`cuda/12`, `gcc/11` and `broken/1` below `folder`; the file that defines `module` and knows where they lie."""
    programs, files, init = folder / "cuda-bin", folder / "modulefiles", folder / "init.sh"
    programs.mkdir()
    (programs / "of-the-module").write_text("#!/bin/sh\necho brought by the module\n")
    (programs / "of-the-module").chmod(0o755)
    texts = {
        "cuda/12": CUDA.format(bin=programs),
        "gcc/11": "#%Module1.0\nsetenv CC gcc-11\n",
        "broken/1": '#%Module1.0\nerror "its licence has run out"\n',
    }
    for name, text in texts.items():
        (files / name).parent.mkdir(parents=True)
        (files / name).write_text(text)
    init.write_text(f". /usr/share/modules/init/sh\nmodule use {files}\n")
    return init
