"""The routes for presets: the settings of the tab's form under names."""

from __future__ import annotations

from fastapi import HTTPException

from hyper_merge.api.deserialize import parse_preset, refusals
from hyper_merge.api.request_models import PresetBody
from hyper_merge.api.response_models import PresetResponse, PresetsResponse
from hyper_merge.hosts.host import Host
from hyper_merge.runs.presets import delete_preset, load_presets, save_preset


class PresetRoutes:
    """The functions of the routes; their docstrings are the descriptions in the schema."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def presets(self) -> PresetsResponse:
        """Returns all presets with their settings, which are values of the tab's form."""
        with refusals():
            presets = load_presets(self._host.folders().runs)
            rows = [PresetResponse(name=name, settings=dict(row)) for name, row in presets.items()]
            return PresetsResponse(presets=rows)

    def save(self, body: PresetBody) -> PresetResponse:
        """Saves a preset, in place of one of the same name; the tab offers it at once.

        What the tab's form does not have, or cannot hold, it leaves out when it loads the preset.
        """
        with refusals():
            settings = parse_preset(body)
            name = save_preset(self._host.folders().runs, body.name, settings)
            return PresetResponse(name=name, settings=settings)

    def delete(self, name: str) -> PresetsResponse:
        """Deletes the preset of a name; returns those that are left."""
        folder = self._host.folders().runs
        with refusals():
            if name not in load_presets(folder):
                raise HTTPException(404, f"expected the name of a preset, got {name!r:.80}")
            delete_preset(folder, name)
        return self.presets()
