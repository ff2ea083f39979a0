"""The routes for the use of a run: prompts of mixtures, prompt styles, and earlier comparisons."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import HTTPException, Response

from hyper_merge.api.deserialize import parse_shares, refusals
from hyper_merge.api.request_models import MixtureBody
from hyper_merge.api.response_models import (
    ComparisonResponse,
    ComparisonsResponse,
    MixtureResponse,
    StylesResponse,
)
from hyper_merge.errors import OutputError, RunError
from hyper_merge.hosts.host import Host
from hyper_merge.operations.compare.records import (
    comparison_names,
    comparison_paths,
    load_comparison,
)
from hyper_merge.runs.fit_records import styles_of
from hyper_merge.runs.run import Run, load_run
from hyper_merge.runs.weighted_loras import mixture_tags


class UseRoutes:
    """The functions of the routes; their docstrings are the descriptions in the schema."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def mix(self, name: str, body: MixtureBody) -> MixtureResponse:
        """Returns the prompt that makes the hyper-model a mixture of a run's checkpoints."""
        with refusals():
            run = load_run(self._host.folders(), name)
            return MixtureResponse(
                prompt=mixture_tags(run, parse_shares(body.shares)),
                hyper_model_title=self._host.checkpoint_title(run.hyper_model),
            )

    def save_styles(self, name: str) -> StylesResponse:
        """Saves a prompt style for every checkpoint of a run, in place of earlier ones of these names."""
        with refusals():
            styles = styles_of(load_run(self._host.folders(), name))
            if not self._host.has_txt2img:
                raise OutputError(
                    f"{self._host.title} has no prompt styles", hint="they are the WebUI's"
                )
            self._host.save_styles(styles)
            return StylesResponse(styles=list(styles))

    def remove_styles(self, name: str) -> StylesResponse:
        """Removes the prompt styles of a run; others stay."""
        with refusals():
            styles = styles_of(load_run(self._host.folders(), name)).keys() & self._host.styles()
            self._host.remove_styles(styles)
            return StylesResponse(styles=sorted(styles))

    def comparisons(self, name: str) -> ComparisonsResponse:
        """Returns the names of a run's comparisons, the newest first."""
        with refusals():
            run = load_run(self._host.folders(), name)
            return ComparisonsResponse(comparisons=comparison_names(run))

    def comparison(self, name: str, comparison: str) -> ComparisonResponse:
        """Returns the settings and the figures of a comparison."""
        with refusals():
            run = self._require_run(name, comparison)
            return ComparisonResponse(**asdict(load_comparison(run, comparison)))

    def picture(self, name: str, comparison: str) -> Response:
        """Returns the pictures of a comparison in one grid, as PNG with its parameters."""
        with refusals():
            path, _ = comparison_paths(self._require_run(name, comparison), comparison)
            try:
                return Response(path.read_bytes(), media_type="image/png")
            except OSError as error:
                raise RunError(
                    f"{path.name} cannot be read ({error.strerror or error})",
                    hint="compare again",
                ) from error

    def _require_run(self, name: str, comparison: str) -> Run:
        """Returns a run that has a comparison."""
        run = load_run(self._host.folders(), name)
        if comparison not in comparison_names(run):
            raise HTTPException(404, f"{run.name} has no comparison {comparison!r:.80}")
        return run
