"""What the API answers without a job: lists, looks, plans, refusals; by names alone."""

import json

import pytest
from tiny_family import snapshot

from hyper_merge.api.request_models import PlanBody
from hyper_merge.api.response_models import ReportResponse, RunCheckpointResponse
from hyper_merge.recipe.recipe import FIELDS
from hyper_merge.runs.fit_records import load_fits
from hyper_merge.runs.folders import Folders
from hyper_merge.runs.report import CheckpointReport, Report
from hyper_merge.runs.run import load_run
from hyper_merge.ui.html.common import format_percent
from hyper_merge.ui.html.result import format_run_card

NAMES = ["a.safetensors", "b.safetensors", "sub/c.safetensors"]
BODY = {"checkpoints": NAMES, "ranks": [4, 2], "device": "cpu", "iterations": 3}
COMPARISON = "runs/{name}/comparisons/{comparison}"
ROUTES = {
    *(("get", f"/hyper-merge/{name}") for name in ("checkpoints", "cache", "jobs", "runs")),
    *(
        ("post", f"/hyper-merge/{name}")
        for name in ("refresh", "inspect", "demo", "plan", "look", "merge", "fit", "average")
    ),
    *(
        ("post", f"/hyper-merge/{name}")
        for name in ("absorb", "restore", "export", "extract", "safe", "compare")
    ),
    ("delete", "/hyper-merge/cache"),
    *((method, "/hyper-merge/presets") for method in ("get", "post", "delete")),
    ("get", "/hyper-merge/loras"),
    *(
        ("post", f"/hyper-merge/loras/{name}")
        for name in ("inspect", "share", "resize", "combine", "add", "subtract", "fit")
    ),
    ("get", "/hyper-merge/jobs/{job_id}"),
    ("post", "/hyper-merge/jobs/{job_id}/cancel"),
    ("get", "/hyper-merge/runs/{name}"),
    ("delete", "/hyper-merge/runs/{name}"),
    ("post", "/hyper-merge/runs/{name}/mix"),
    ("post", "/hyper-merge/runs/{name}/styles"),
    ("delete", "/hyper-merge/runs/{name}/styles"),
    ("get", "/hyper-merge/runs/{name}/comparisons"),
    ("get", f"/hyper-merge/{COMPARISON}"),
    ("get", f"/hyper-merge/{COMPARISON}/picture"),
}


def test_the_list_is_the_hosts_own(client, root):
    code, answer = client.get("/checkpoints")
    size = (root / "Stable-diffusion" / NAMES[0]).stat().st_size
    assert code == 200
    assert answer == {
        "checkpoints": [{"name": name, "short_hash": None, "size": size} for name in NAMES]
    }


def test_an_inspection_describes_checkpoints_and_their_problems(client, root):
    (root / "Stable-diffusion" / "broken.safetensors").write_bytes(b"nothing")
    code, answer = client.post(
        "/inspect", {"checkpoints": ["sub/c.safetensors", "broken.safetensors"]}
    )
    good, bad = answer["checkpoints"]
    assert code == 200
    assert (good["name"], good["family"]) == ("sub/c.safetensors", "Stable Diffusion 1.x")
    assert (good["dtype"], good["problem"]) == ("fp16", None)
    assert len(good["legacy_hash"]) == 8
    assert "broken.safetensors" in bad["problem"]
    assert (bad["family"], bad["size"]) == (None, 7)


def test_a_plan_lists_the_outputs_and_writes_nothing(client, root):
    before = snapshot(root)
    code, answer = client.post("/plan", {**BODY, "name": "mine"})
    assert code == 200
    assert answer["name"] == "mine"
    assert answer["loras"] == ["mine_0-4", "mine_1-2"]
    assert answer["hyper_model"]["name"] == "mine.safetensors"
    assert not answer["hyper_model"]["exists"]
    assert answer["loras_size"] > 0
    assert answer["seconds"] > 0
    assert answer["training"] == 0  # no network of these
    assert answer["expected"] is None
    assert snapshot(root) == before
    assert not (root / "hyper-merge").exists()


def test_a_plan_without_a_name_has_a_free_one(client, root):
    assert client.post("/plan", BODY)[1]["name"] == "hyper-a-3"
    (root / "Stable-diffusion" / "hyper-a-3.safetensors").write_bytes(b"mine")
    assert client.post("/plan", BODY)[1]["name"] == "hyper-a-3-b"


def test_a_plan_of_the_same_checkpoints_reuses_their_average(client, run):
    code, answer = client.post("/plan", {**BODY, "name": "mix", "ranks": [3]})
    assert code == 200
    assert answer["hyper_model"]["exists"]
    assert (answer["name"], answer["loras"]) == ("mix-2", ["mix-2_0-3"])


@pytest.mark.parametrize("size", [{"budget": "300 MB"}, {"budget": 300_000_000}])
def test_a_budget_sets_the_size_before_any_ranks(client, size):
    body = {key: value for key, value in BODY.items() if key != "ranks"}
    code, answer = client.post("/plan", {**body, **size})
    assert code == 200
    assert (answer["loras"], answer["loras_size"]) == ([], 300_000_000)


def test_a_share_has_no_forecast_before_an_inspection(client):
    body = {key: value for key, value in BODY.items() if key != "ranks"}
    code, answer = client.post("/plan", {**body, "target": "95%"})
    assert code == 200
    assert (answer["loras"], answer["loras_size"]) == ([], None)


def test_another_base_is_named_by_the_list_too(client):
    code, answer = client.post("/plan", {**BODY, "checkpoints": NAMES[:2], "base": NAMES[2]})
    assert code == 200
    assert answer["hyper_model"] == {
        **answer["hyper_model"],
        "name": "c.safetensors",
        "exists": True,
    }


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (
            {"checkpoints": ["a.safetensors"]},
            "checkpoints: a merge takes two checkpoints or more, got 1",
        ),
        ({"checkpoints": []}, "checkpoints: a merge takes two checkpoints or more, got 0"),
        ({"ranks": []}, "ranks: expected 1 to 64 ranks, one per LoRA, got none"),
        (
            {"ranks": [4, 0]},
            "ranks: item 2: expected a whole number from 1 to 4096, got the number 0",
        ),
        ({"budget": "300MB"}, "budget: expected one of ranks, budget, target"),
        ({"ranks": None, "budget": "1kB"}, "the budget of 1 kB is too small"),
        ({"ranks": None, "target": 95}, 'target: expected a share, such as "95%"'),
        ({"ranks": None, "target": 0.9, "allocation": "even"}, "target: goes with adaptive"),
        ({"name": "../mine"}, 'name: the path separator "/" is not allowed'),
        ({"name": ""}, "name: expected text"),
        ({"name": "nul"}, "name: expected a name that is not reserved"),
        (
            {"dtype": "float61"},
            'dtype: expected one of float16, bfloat16, float32, got "float61"; did',
        ),
        ({"device": "tpu"}, "device: expected auto, cpu, cuda or cuda:N"),
        ({"weights": [1, 2]}, "weights: expected 3 numbers, one per checkpoint, got 2"),
        ({"weights": [0, 0, 0.0]}, "weights: expected weights with a sum above 0"),
        ({"topup": "100%"}, "topup: expected a rank from 1"),
        ({"iterations": 0}, "iterations: expected a whole number from 1"),
        ({"tolerance": 2}, "tolerance: expected a number from 0 to 1"),
        ({"seed": -1}, "seed: expected a whole number from 0"),
    ],
)
def test_an_impossible_setting_is_named_and_nothing_begins(client, root, jobs, body, words):
    before = snapshot(root)
    for path in ("/plan", "/merge", "/look"):
        code, answer = client.post(path, {**BODY, **body})
        assert code == 400
        assert words in answer["detail"]
    assert jobs.known == ()
    assert snapshot(root) == before


@pytest.mark.parametrize(
    "evil",
    [
        "../../secret.safetensors",
        "{root}/Stable-diffusion/a.safetensors",
        "sub/../a.safetensors",
        "Stable-diffusion/a.safetensors",
        "sub\\c.safetensors",
        "A.SAFETENSORS",
        "a",
        "",
        "a.safetensors\0",
        "http://localhost/a.safetensors",
    ],
)
def test_a_name_outside_the_list_is_never_looked_up(client, root, run, evil):
    (root.parent / "secret.safetensors").write_bytes(b"secret")
    evil = evil.format(root=root)
    for path, body in {
        "/inspect": {"checkpoints": [evil]},
        "/plan": {**BODY, "checkpoints": [NAMES[0], evil]},
        "/merge": {**BODY, "checkpoints": [evil, NAMES[0]]},
        "/fit": {"run": run, "checkpoint": evil},
    }.items():
        code, answer = client.post(path, body)
        assert code == 400
        assert "expected a name of the host's list, got" in answer["detail"]
    code, answer = client.post("/plan", {**BODY, "base": evil})
    assert code == 400
    assert answer["detail"].startswith("base: expected a name of the host's list")


def test_a_misspelt_name_is_answered_with_the_nearest(client):
    _, answer = client.post("/inspect", {"checkpoints": ["sub/c.safetensor"]})
    assert answer["detail"].endswith('did you mean "sub/c.safetensors"?')


def test_a_file_that_has_gone_since_is_refused(client, root, host, monkeypatch):
    listed = host.checkpoints()
    monkeypatch.setattr(host, "checkpoints", lambda: listed)
    (root / "Stable-diffusion" / NAMES[0]).unlink()
    code, answer = client.post("/plan", BODY)
    assert code == 400
    assert answer["detail"] == "checkpoints: the file of a.safetensors is no longer there"
    assert client.get("/checkpoints")[1]["checkpoints"][0]["size"] == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("checkpoints", "a.safetensors"),
        ("checkpoints", [1]),
        ("checkpoints", None),
        ("ranks", "4, 2"),
        ("ranks", [4.7]),
        ("ranks", ["4"]),
        ("ranks", [True]),
        ("weights", ["1", 1, 1]),
        ("iterations", 3.5),
        ("iterations", "3"),
        ("tolerance", True),
        ("name", 5),
        ("topup", [16]),
        ("seed", {}),
        ("save_styles", "yes"),
        ("output", "/tmp"),
        ("models", ["/tmp/a.safetensors"]),
        ("overwrite", True),
        ("rank", [4]),
    ],
)
def test_a_mistyped_or_unknown_field_is_refused_by_place(client, jobs, field, value):
    code, answer = client.post("/merge", {**BODY, field: value})
    assert code == 422
    assert any(field in problem["loc"] for problem in answer["detail"])
    assert jobs.known == ()


@pytest.mark.parametrize("body", ["", "{", "[]", "null", "checkpoints"])
def test_a_malformed_request_is_refused(client, body):
    headers = {"content-type": "application/json"}
    answer = client.http.post("/hyper-merge/plan", content=body, headers=headers)
    assert answer.status_code == 422


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded"])
def test_a_request_from_another_site_starts_nothing(client, jobs, kind):
    """Browsers send these kinds, and no JSON, to other sites without asking there first."""
    answer = client.http.post(
        "/hyper-merge/merge", content=json.dumps(BODY), headers={"content-type": kind}
    )
    assert answer.status_code == 422
    assert jobs.known == ()


def test_nan_is_refused_in_a_number_field(client):
    body = json.dumps({**BODY, "tolerance": float("nan")})
    headers = {"content-type": "application/json"}
    answer = client.http.post("/hyper-merge/plan", content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith("tolerance: expected a number from 0 to 1")


@pytest.mark.parametrize("field", ["checkpoints", "ranks", "name"])
def test_nan_is_refused_in_fields_without_numbers(client, field):
    body = json.dumps({**BODY, field: float("nan")})
    headers = {"content-type": "application/json"}
    answer = client.http.post("/hyper-merge/plan", content=body, headers=headers)
    assert answer.status_code == 422
    assert any(field in problem["loc"] for problem in answer.json()["detail"])


def test_incompatible_checkpoints_are_refused_with_our_message(client, root):
    (root / "Stable-diffusion" / "broken.safetensors").write_bytes(b"nothing")
    code, answer = client.post("/plan", {**BODY, "checkpoints": [NAMES[0], "broken.safetensors"]})
    assert code == 400
    assert "broken.safetensors" in answer["detail"]


def test_runs_are_listed_with_what_is_wrong_with_others(client, root, run):
    (root / "hyper-merge" / "old").mkdir()
    (root / "hyper-merge" / "old" / "manifest.json").write_text("{")
    code, answer = client.get("/runs")
    (run_summary,) = answer["runs"]
    assert code == 200
    assert (run_summary["name"], run_summary["ranks"]) == ("mix", [4, 2])
    assert run_summary["checkpoints"] == ["a", "b", "c"]
    assert run_summary["missing"] == []
    assert 0 < run_summary["explained_worst"] <= run_summary["explained"] < 1
    rows = client.get("/runs/mix")[1]["checkpoints"]
    assert run_summary["explained"] == sum(row["explained"] for row in rows) / 3
    loaded = load_run(Folders.under(root), "mix")
    assert run_summary["explained"] == loaded.report.fidelity_mean
    shown = format_percent(run_summary["explained"])
    assert f"<dt>explained in the mean</dt><dd>{shown}</dd>" in format_run_card(loaded)
    assert "the run old cannot be read" in answer["problems"][0]


def test_without_runs_the_list_is_empty(client):
    assert client.get("/runs") == (200, {"runs": [], "problems": []})


def test_a_run_has_its_report_and_its_prompts(client, root, run):
    code, answer = client.get("/runs/mix")
    report = load_run(Folders.under(root), run).report
    assert code == 200
    assert answer["hyper_model"] == "mix.safetensors"
    assert answer["loras"] == list(report.loras)
    assert answer["settings"]["ranks"] == "4, 2"
    assert [row["name"] for row in answer["checkpoints"]] == ["a", "b", "c"]
    for row, known in zip(answer["checkpoints"], report.checkpoints, strict=True):
        assert row["prompt"] == report.tags(known)
        assert row["multipliers"] == list(known.multipliers)
        assert row["explained"] == known.fidelity
        assert row["explained_in_weights"] == known.explained
    assert answer["report"]["loss"] == report.loss
    assert len(answer["report"]["curve"]) == 3
    assert answer["fits"] == []
    assert load_fits(load_run(Folders.under(root), run)) == ((), ())


def test_no_answer_has_a_folder_in_it(client, root, run):
    body = {"checkpoints": NAMES}
    answers = [client.get("/checkpoints"), client.get("/runs"), client.get("/runs/mix")]
    answers += [client.post("/inspect", body), client.post("/plan", {**BODY, "name": "new"})]
    assert all(code == 200 for code, _ in answers)
    assert str(root) not in json.dumps(answers)


def test_lost_files_of_a_run_are_named(client, root, run):
    (root / "Lora" / "mix_0-4.safetensors").unlink()
    assert client.get("/runs/mix")[1]["missing"] == ["mix_0-4.safetensors"]
    assert client.get("/runs")[1]["runs"][0]["missing"] == ["mix_0-4.safetensors"]


@pytest.mark.parametrize(
    "name", ["mxi", "..", "%2e%2e", "..%2f..%2fsecret", "cache", "mix%00", " "]
)
def test_a_run_that_is_unknown_is_not_found(client, root, run, name):
    (root / "manifest.json").write_text("{}")
    (root / "hyper-merge" / "cache").mkdir(exist_ok=True)
    answer = client.http.get(f"/hyper-merge/runs/{name}")
    assert answer.status_code == 404


def test_an_unknown_run_is_answered_with_the_nearest(client, run):
    code, answer = client.get("/runs/mxi")
    assert code == 404
    assert 'did you mean "mix"?' in answer["detail"]


def test_a_run_of_a_newer_version_is_refused(client, root, run):
    path = root / "hyper-merge" / "mix" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "version": 99, "hyper_merge": "9.9"}))
    code, answer = client.get("/runs/mix")
    assert code == 400
    assert "was made by Hyper-Merge 9.9" in answer["detail"]


def test_the_schema_describes_every_route(app):
    schema = app.openapi()
    routes = {(method, path) for path, methods in schema["paths"].items() for method in methods}
    assert routes == ROUTES
    for method, path in ROUTES:
        route = schema["paths"][path][method]
        assert len(route["description"]) > 20
        if path.endswith("/picture"):
            assert set(route["responses"]["200"]["content"]) == {"image/png"}
            continue
        good = next(code for code in ("200", "202") if code in route["responses"])
        content = route["responses"][good]["content"]["application/json"]["schema"]
        name = content["$ref"].rpartition("/")[2]
        assert schema["components"]["schemas"][name]["properties"], name
        if "requestBody" in route:
            body = route["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            body = schema["components"]["schemas"][body.rpartition("/")[2]]
            assert body["additionalProperties"] is False
            for field, words in body["properties"].items():
                assert words.get("description"), f"{body}.{field}"
    json.dumps(schema)


def test_every_recipe_setting_but_the_folders_can_be_requested():
    known = set(PlanBody.__annotations__)
    others = {"models", "output", "overwrite"}
    assert {field.name for field in FIELDS} - known == others
    assert known - {field.name for field in FIELDS} == {"checkpoints"}


def test_a_runs_answer_has_every_figure_of_its_report():
    elsewhere = {"name", "loras", "companions", "checkpoints"}
    assert set(Report.__dataclass_fields__) - elsewhere == set(ReportResponse.__annotations__)
    row = set(CheckpointReport.__dataclass_fields__) - {"topup", "explained_weighted"}
    assert row | {"explained_in_weights", "prompt", "topups"} == set(
        RunCheckpointResponse.__annotations__
    )


def test_a_whole_number_may_be_written_with_a_fraction_of_zero(client):
    code, answer = client.post("/plan", {**BODY, "name": "mine", "ranks": [4.0, 2e0]})
    assert (code, answer["loras"]) == (200, ["mine_0-4", "mine_1-2"])
    assert client.post("/plan", {**BODY, "ranks": [4.5]})[0] == 422


@pytest.mark.parametrize("path", ["/cache", "/runs/mix", "/runs/mix/styles"])
def test_a_method_that_a_path_lacks_is_answered_with_all_that_it_has(client, path):
    answer = client.http.put(f"/hyper-merge{path}")
    assert (answer.status_code, answer.json()) == (405, {"detail": "Method Not Allowed"})
    assert answer.headers["allow"] == ("DELETE, POST" if "styles" in path else "DELETE, GET")
