"""What is made of runs through the API: LoRAs, checkpoints, checks, pictures; and deleting a run."""

import io
import shutil

import pytest
from fake_webui import installed
from PIL import Image
from tiny_family import snapshot

from hyper_merge.api.examples import EXAMPLES
from hyper_merge.hosts.host import GeneratorInfo
from hyper_merge.hosts.standalone import Standalone
from hyper_merge.operations.compare.compare import ImageGenerator
from hyper_merge.runtime.progress import Progress


def done(client, path, body):
    """Returns the job of a request once it is done."""
    code, job = client.post(path, body)
    assert (code, job["outcome"], job["result"]) == (202, "running", None), job
    job = client.ended(job)
    assert (job["outcome"], job["message"], job["fraction"]) == ("done", "", 1.0), job
    if job["result"] is not None:
        assert_like_an_example(job["result"])
    return job


def assert_like_an_example(result):
    """Fails unless an example of a job's result in the schema has the same fields."""
    examples = EXAMPLES["GET", "/jobs/{job_id}"].answers.values()
    known = [fields(example["result"]) for example in examples if example["result"]]
    assert fields(result) in known


def fields(value):
    """Returns the names of fields, also within the first of a list; free names have no fixed ones."""
    if isinstance(value, list):
        return fields(value[0]) if value else None
    if not isinstance(value, dict):
        return None
    free = {"shares", "parts", "not_carried", "pixels", "perceptual"}
    return {name: None if name in free else fields(part) for name, part in value.items()}


def test_a_checkpoint_and_a_mixture_are_restored(client, root, run):
    result = done(client, "/restore", {"run": "mix", "shares": {"a": 1}})["result"]
    assert result["file"] == "a-restored.safetensors"
    assert (root / "Stable-diffusion" / result["file"]).stat().st_size == result["size"]
    assert 0.2 < result["explained_in_weights"] <= 1
    body = {"run": "mix", "shares": {"a": 0.5, "b": 0.25}, "name": "half", "dtype": "float32"}
    result = done(client, "/restore", body)["result"]
    assert (result["file"], result["dtype"]) == ("half.safetensors", "float32")
    assert (root / "Stable-diffusion/half.safetensors").exists()
    job = client.ended(client.post("/restore", body)[1])
    assert (job["outcome"], job["result"]) == ("refused", None)
    assert "half.safetensors exists" in job["message"]


def test_each_checkpoint_gets_one_lora(client, root, run):
    (lora,) = done(client, "/export", {"run": "mix", "checkpoints": ["b"]})["result"]["loras"]
    assert (lora["checkpoint"], lora["name"]) == ("b", "mix_b")
    assert (root / "Lora/mix_b.safetensors").stat().st_size == lora["size"]


def test_a_lora_is_extracted_from_two_checkpoints(client, root):
    body = {"base": "a.safetensors", "checkpoint": "sub/c.safetensors", "rank": 2, "device": "cpu"}
    result = done(client, "/extract", body)["result"]
    assert (result["name"], result["rank"]) == ("c-from-a", 2)
    assert (root / "Lora/c-from-a.safetensors").exists()


def test_the_check_of_originals_deletes_nothing(client, root, run):
    before = snapshot(root)
    result = done(client, "/safe", {"run": "mix", "threshold": "1%"})["result"]
    assert [row["restored_as"] for row in result["originals"]] == ["a", "b", "c"]
    assert all(row["safe"] for row in result["originals"])
    assert "path" not in result["originals"][0]
    assert result["frees"] > 0
    assert snapshot(root) == before


def test_a_run_absorbs_a_checkpoint(client, root, run):
    done(client, "/restore", {"run": "mix", "shares": {"a": 0.5, "b": 0.5}, "name": "d"})
    body = {"run": "mix", "checkpoints": ["d.safetensors"], "name": "four"}
    assert done(client, "/absorb", body)["run"] == "four"
    assert len(client.get("/runs/four")[1]["checkpoints"]) == 4


def test_an_average_is_made_alone(client, root):
    body = {"checkpoints": ["a.safetensors", "b.safetensors"], "name": "mean", "weights": [1, 3]}
    assert done(client, "/average", body)["result"]["file"] == "mean.safetensors"
    assert (root / "Stable-diffusion/mean.safetensors").exists()
    assert client.get("/runs")[1]["runs"] == []


@pytest.fixture
def draws(monkeypatch):
    """A host that draws grey pictures."""

    class Drawing:
        def __enter__(self):
            def draw(picture, progress):
                return Image.new("RGB", (64, 64), (len(picture.prompt) % 256,) * 3)

            return Progress(), ImageGenerator("Grey", draw, lambda path: "")

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(Standalone, "generator_info", lambda self: GeneratorInfo(("Euler",)))
    monkeypatch.setattr(Standalone, "drawing", lambda self, task: Drawing())


@pytest.mark.usefixtures("draws")
def test_pictures_are_compared(client, root, run):
    body = {"run": "mix", "prompts": ["a cat"], "width": 64, "height": 64, "checkpoints": ["a"]}
    result = done(client, "/compare", body)["result"]
    assert result["name"] == "comparison-1"
    assert [row["checkpoint"] for row in result["figures"]] == ["a"]
    (picture,) = (root / "hyper-merge/mix").rglob("comparison-1.png")
    assert client.get("/runs/mix/comparisons") == (200, {"comparisons": ["comparison-1"]})
    code, comparison = client.get("/runs/mix/comparisons/comparison-1")
    assert (code, comparison["figures"]) == (200, result["figures"])
    assert comparison["settings"]["prompts"] == ["a cat"]
    answer = client.http.get("/hyper-merge/runs/mix/comparisons/comparison-1/picture")
    assert answer.headers["content-type"] == "image/png"
    assert answer.content == picture.read_bytes()
    assert Image.open(io.BytesIO(answer.content)).format == "PNG"


@pytest.mark.parametrize("name", ["comparison-2", "x", "..%2fmanifest", "comparison-1.json"])
@pytest.mark.parametrize("ending", ["", "/picture"])
def test_a_comparison_that_is_unknown_is_not_found(client, run, name, ending):
    assert client.get(f"/runs/mix/comparisons/{name}{ending}")[0] == 404


def test_the_prompt_of_a_mixture_is_that_of_the_sliders(client, run):
    rows = client.get("/runs/mix")[1]["checkpoints"]
    mix = "/runs/mix/mix"
    code, answer = client.post(mix, {"shares": {"b": 1}})
    assert (code, answer["prompt"]) == (200, rows[1]["prompt"])
    assert client.post(mix, {"shares": {"a": 0, "b": 1}})[1] == answer
    assert client.post(mix, {"shares": {"a": 0.5, "b": 0.5}})[1] != answer
    assert client.post("/runs/gone/mix", {"shares": {"a": 1}})[0] == 404
    for shares in ({}, {"z": 1}, {"a": 10**400}):
        assert client.post(mix, {"shares": shares})[0] == 400


def test_styles_of_a_run_are_saved_and_removed_in_a_webui(root, run, open_client):
    with installed(root, "forge", api=True) as webui:
        webui.load_scripts()
        client, route = open_client(webui.api_only()), "/runs/mix/styles"
        names = ["mix: a", "mix: b", "mix: c"]
        assert client.post(route) == (200, {"styles": names})
        assert set(names) <= webui.host().styles().keys()
        assert client.http.delete(f"/hyper-merge{route}").json() == {"styles": names}
        assert not set(names) & webui.host().styles().keys()
        assert client.http.delete(f"/hyper-merge{route}").json() == {"styles": []}
        assert client.post("/runs/gone/styles")[0] == 404


def test_a_program_without_styles_says_so(client, run):
    code, answer = client.post("/runs/mix/styles")
    assert code == 400
    assert "has no prompt styles" in answer["detail"]


def test_a_file_that_came_since_is_listed_after_a_refresh(root, open_client):
    with installed(root, "forge", api=True) as webui:
        webui.load_scripts()
        client = open_client(webui.api_only())
        folder = root / "Stable-diffusion"
        shutil.copy(folder / "a.safetensors", folder / "new.safetensors")
        before = client.get("/checkpoints")[1]["checkpoints"]
        after = client.post("/refresh")[1]["checkpoints"]
        assert {row["name"] for row in after} - {row["name"] for row in before} == {
            "new.safetensors"
        }


def test_the_cache_is_measured_and_cleared_when_nothing_runs(client, root, endless):
    body = {"checkpoints": ["a.safetensors", "b.safetensors"], "name": "new", "device": "cpu"}
    client.ended(client.post("/look", body)[1])
    code, held = client.get("/cache")
    assert code == 200
    assert held["size"] > 0
    job = client.post("/merge", body)[1]
    assert client.http.delete("/hyper-merge/cache").status_code == 409
    client.post(f"/jobs/{job['id']}/cancel")
    client.ended(job)
    assert client.http.delete("/hyper-merge/cache").json() == {
        "size": 0,
        "limit": held["limit"],
        "freed": held["size"],
    }


def test_the_demo_makes_checkpoints_to_try_with(client, root, monkeypatch):
    def make_family(folder, progress):
        progress.report("making", 0.5)
        shutil.copy(folder / "a.safetensors", folder / "anime.safetensors")

    monkeypatch.setattr("hyper_merge.api.host_routes.make_family", make_family)
    code, job = client.post("/demo")
    assert (code, client.ended(job)["outcome"]) == (202, "done")
    assert "anime.safetensors" in {c["name"] for c in client.get("/checkpoints")[1]["checkpoints"]}


def test_a_run_is_deleted_with_its_files(client, root, run):
    code, answer = client.http.delete("/hyper-merge/runs/mix").status_code, None
    assert code == 200
    assert client.get("/runs/mix")[0] == 404
    assert not list((root / "Lora").glob("mix*"))
    assert (root / "Stable-diffusion/a.safetensors").exists()
    answer = client.http.delete("/hyper-merge/runs/mix")
    assert answer.status_code == 404


REFUSED = (
    ("/restore", {"run": "mix", "shares": {}}, "shares: expected one checkpoint or more"),
    ("/restore", {"run": "mix", "shares": {"a": 10**400}}, "shares: expected a number below"),
    ("/restore", {"run": "mix", "shares": {"a": 1}, "name": "../x"}, "name: "),
    ("/restore", {"run": "mix", "shares": {"a": 1}, "dtype": "int8"}, "dtype: "),
    ("/export", {"run": "mix", "rank": 0}, "rank: "),
    ("/extract", {"base": "../a", "checkpoint": "b.safetensors"}, "base: expected a name"),
    (
        "/extract",
        {"base": "a.safetensors", "checkpoint": "b.safetensors", "damaged": "maybe"},
        "damaged: expected one of refuse, accept",
    ),
    ("/safe", {"run": "mix", "threshold": "much"}, "threshold: expected a share"),
    ("/absorb", {"run": "mix", "checkpoints": ["/etc/passwd"]}, "checkpoints: expected a name"),
    ("/average", {"checkpoints": ["a.safetensors"], "name": "x"}, "checkpoints: a merge takes two"),
    ("/compare", {"run": "mix", "prompts": []}, "expected a prompt"),
    ("/compare", {"run": "mix", "prompts": ["x"], "sampler": "?"}, "sampler: expected a sampler"),
    ("/compare", {"run": "mix", "prompts": ["x"], "checkpoints": ["z"]}, ""),
)


@pytest.mark.usefixtures("draws", "run")
@pytest.mark.parametrize(("path", "body", "message"), REFUSED)
def test_what_is_wrong_is_refused_at_once(client, jobs, path, body, message):
    code, answer = client.post(path, body)
    assert code == 400
    assert answer["detail"].startswith(message)
    assert jobs.last is None


@pytest.mark.usefixtures("draws")
@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("/restore", {"shares": {"a": 1}}),
        ("/export", {}),
        ("/safe", {}),
        ("/absorb", {"checkpoints": ["a.safetensors"]}),
        ("/compare", {"prompts": ["x"]}),
    ],
)
def test_an_unknown_run_is_not_found(client, path, more):
    assert client.post(path, {"run": "gone", **more})[0] == 404


def test_a_host_that_cannot_draw_says_so(client, run, monkeypatch):
    monkeypatch.setattr(
        Standalone, "generator_info", lambda self: GeneratorInfo(problem="install diffusers")
    )
    code, answer = client.post("/compare", {"run": "mix", "prompts": ["x"]})
    assert (code, answer["detail"]) == (400, "install diffusers")


def test_nothing_else_begins_while_a_job_runs(client, run, endless):
    body = {"checkpoints": ["a.safetensors", "b.safetensors"], "name": "new", "device": "cpu"}
    assert client.post("/merge", body)[0] == 202
    for path, other in (
        ("/safe", {"run": "mix"}),
        ("/average", body),
        ("/extract", {"base": "a.safetensors", "checkpoint": "b.safetensors"}),
    ):
        assert client.post(path, other)[0] == 409
    assert client.http.delete("/hyper-merge/runs/mix").status_code == 409
