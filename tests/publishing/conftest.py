import huggingface_hub
import pytest
import transformers

from helpers.hub_server import HubServer


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on this machine, for this process and for those that it starts with `hub.environment`."""
    server = HubServer()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    # transformers keeps the first client it made, with the address of that moment
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    yield server
    server.stop()
