"""How OpenMP's threads wait: as the library itself says when it is loaded after the command line began."""

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from kd.openmp import SPIN_COUNT

from .commands import environment

SPEC = find_spec("torch")
LIBRARY = next(iter(Path(SPEC.origin).parent.glob("lib/libgomp*.so*")), None) if SPEC and SPEC.origin else None
PROGRAM = """
import ctypes, sys
from kd.train import main
try:
    main()
finally:
    assert "torch" not in sys.modules
    ctypes.CDLL(sys.argv[0])
"""


@pytest.mark.skipif(LIBRARY is None, reason="this torch brings no GNU OpenMP")
@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, str(SPIN_COUNT)), ({"GOMP_SPINCOUNT": "17"}, "17"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "30000000000")],
    ids=["nothing said", "a count of the user's", "a policy of the user's"],
)
def test_threads_sleep_while_they_wait_unless_the_user_wants_otherwise(given: dict[str, str], spins: str) -> None:
    variables = environment(OMP_DISPLAY_ENV="verbose")
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        variables.pop(name, None)
    program = PROGRAM.replace("sys.argv[0]", repr(str(LIBRARY)))
    command = [sys.executable, "-c", program, "seed=-1"]
    answer = subprocess.run(command, env=variables | given, capture_output=True, text=True, check=False)
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", answer.stderr) == [spins], answer.stderr
