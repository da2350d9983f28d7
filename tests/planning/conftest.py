import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cost tables of tests stay with the tests."""
    monkeypatch.setenv("FINEBITS_HOME", str(tmp_path_factory.mktemp("home")))
