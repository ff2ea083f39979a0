"""The routes for the host itself: its lists, the cache, and checkpoints to try everything with."""

from __future__ import annotations

from hyper_merge.analysis.cache import cache_bytes, clear_analyses
from hyper_merge.api.deserialize import find_file, refusals
from hyper_merge.api.request_models import InspectBody
from hyper_merge.api.response_models import (
    CacheResponse,
    CheckpointsResponse,
    InspectionResponse,
    JobResponse,
)
from hyper_merge.api.serialize import checkpoints_response, inspected_response, job_response
from hyper_merge.hosts.host import Host
from hyper_merge.hosts.job_queue import Jobs
from hyper_merge.operations.demo import make_family
from hyper_merge.runtime.progress import Progress


class HostRoutes:
    """The functions of the routes; their docstrings are the descriptions in the schema."""

    def __init__(self, host: Host, jobs: Jobs) -> None:
        self._host = host
        self._jobs = jobs

    def checkpoints(self) -> CheckpointsResponse:
        """Returns the host's list of checkpoints, whose names all other requests use."""
        return checkpoints_response(self._host)

    def refresh(self) -> CheckpointsResponse:
        """Has the host read its lists of checkpoints and LoRAs from the disk again; returns the former."""
        self._host.refresh()
        return checkpoints_response(self._host)

    def inspect(self, body: InspectBody) -> InspectionResponse:
        """Returns family, type, hash and VAE of checkpoints, and why one cannot be merged."""
        with refusals():
            listed = self._host.checkpoints()
            files = [(name, find_file(name, "checkpoints", listed)) for name in body.checkpoints]
            return InspectionResponse(
                checkpoints=[inspected_response(name, path, self._host) for name, path in files]
            )

    def demo(self) -> JobResponse:
        """Starts making four small checkpoints among the host's, to try everything with."""

        def work(_task: str, progress: Progress) -> str:
            make_family(self._host.folders().models, progress)
            self._host.refresh()
            return ""

        with refusals():
            return job_response(self._jobs.start("demo checkpoints", work, self._host.log))

    def cache(self) -> CacheResponse:
        """Returns how much the cache of analyses holds."""
        return self._cache(0)

    def clear_cache(self) -> CacheResponse:
        """Empties the cache of analyses, unless a job runs, which may need it."""
        with refusals():
            self._jobs.require_idle()
            return self._cache(clear_analyses(self._host.folders().cache))

    def _cache(self, freed: int) -> CacheResponse:
        folders = self._host.folders()
        return CacheResponse(
            size=cache_bytes(folders.cache), limit=folders.cache_limit, freed=freed
        )
