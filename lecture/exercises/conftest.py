"""`work` is the module under test: the stub, or its solution if EXERCISES=solutions."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from common import exercise


@pytest.fixture(scope="module")
def work(request):
    number = request.path.stem.removeprefix("test_")
    return exercise(number, solved=os.environ.get("EXERCISES") == "solutions")
