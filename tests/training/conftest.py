import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def stubs() -> ModuleType:
    """The module `stub_job`: model, data, task and `job(folder, **run keys)`."""
    path = Path(__file__).with_name("stub_job.py")
    spec = importlib.util.spec_from_file_location("runner_stub_job", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
