"""Long work through the API: begun, followed, cancelled, refused; shared with the tab."""

import shutil
import threading

import pytest
from fake_webui import installed
from tiny_family import snapshot, temporaries

from hyper_merge.errors import OutputError
from hyper_merge.hosts import tasks
from hyper_merge.hosts.job_queue import process_jobs
from hyper_merge.operations.fit.fit import run_fit
from hyper_merge.ui.handlers.merge import stop_job, watch_job

NAMES = ["a.safetensors", "b.safetensors", "sub/c.safetensors"]
BODY = {"checkpoints": NAMES, "name": "mine", "ranks": [4, 2], "device": "cpu", "iterations": 3}


def test_a_merge_is_made_and_has_prompts(client, root, monkeypatch):
    seen, begun = [], threading.Event()
    run_merge = tasks.run_merge

    def slow(preflight, progress):
        assert begun.wait(60)
        return run_merge(preflight, progress)

    monkeypatch.setattr(tasks, "run_merge", slow)
    code, job = client.post("/merge", BODY)
    assert code == 202
    assert (job["title"], job["outcome"], job["run"]) == ("mine", "running", None)
    begun.set()
    while job["outcome"] == "running":
        code, job = client.get(f"/jobs/{job['id']}")
        seen.append(job["fraction"])
        assert code == 200
    assert (job["outcome"], job["run"], job["fraction"]) == ("done", "mine", 1.0)
    assert job["message"] == ""
    assert seen == sorted(seen)
    assert (root / "Stable-diffusion" / "mine.safetensors").exists()
    code, run = client.get("/runs/mine")
    assert code == 200
    assert run["loras"] == ["mine_0-4", "mine_1-2"]
    assert all("<lora:mine_0-4:" in row["prompt"] for row in run["checkpoints"])
    again, answer = client.post("/merge", BODY)
    assert again == 400
    assert "is this very merge already" in answer["detail"]


def test_a_second_job_is_refused_and_cancelling_leaves_nothing(client, root, endless):
    before = snapshot(root)
    _, job = client.post("/merge", BODY)
    for path in ("/merge", "/look"):
        code, answer = client.post(path, {**BODY, "name": "other"})
        assert code == 409
        assert answer["detail"].startswith("mine is still being made")
    assert client.post("/fit", {"run": "mix", "checkpoint": NAMES[0]})[0] == 409
    code, answer = client.post(f"/jobs/{job['id']}/cancel")
    assert code == 200
    assert answer["stopping"]
    job = client.ended(answer)
    assert job["outcome"] == "stopped"
    assert "no file was changed" in job["message"]
    assert job["run"] is None
    assert client.post(f"/jobs/{job['id']}/cancel") == (200, client.get(f"/jobs/{job['id']}")[1])
    assert snapshot(root) == before
    assert not temporaries(root)


def test_a_merge_cancelled_while_running_leaves_nothing(client, root, monkeypatch):
    before, run_merge = snapshot(root), tasks.run_merge
    reached, cancelled = threading.Event(), threading.Event()

    def watched(preflight, progress):
        def on_progress(phase, fraction):
            if fraction > 0.5:
                reached.set()
                assert cancelled.wait(60)

        other = type(progress)(on_progress)
        return run_merge(preflight, progress.joined(other))

    monkeypatch.setattr(tasks, "run_merge", watched)
    _, job = client.post("/merge", BODY)
    assert reached.wait(60)
    assert client.post(f"/jobs/{job['id']}/cancel")[1]["stopping"]
    cancelled.set()
    assert client.ended(job)["outcome"] == "stopped"
    assert snapshot(root) == before
    assert not temporaries(root)


def test_a_job_refused_while_running_says_why(client, monkeypatch):
    def full(preflight, progress):
        raise OutputError("the disk is full")

    monkeypatch.setattr(tasks, "run_merge", full)
    job = client.ended(client.post("/merge", BODY)[1])
    assert (job["outcome"], job["message"]) == ("refused", "the disk is full")


def test_an_unexpected_error_is_logged_and_reported_in_short(client, host, monkeypatch):
    def fail(preflight, progress):
        raise RuntimeError("shapes\nat layer 7")

    logged = []
    monkeypatch.setattr(tasks, "run_merge", fail)
    monkeypatch.setattr(host, "log", logged.append)
    job = client.ended(client.post("/merge", BODY)[1])
    assert (job["outcome"], job["message"]) == ("failed", "RuntimeError: shapes")
    assert len(logged) == 1


def test_an_inspection_gives_the_next_plan_its_forecast(client, root):
    before = snapshot(root)
    code, job = client.post("/look", BODY)
    assert code == 202
    assert client.ended(job)["outcome"] == "done"
    assert snapshot(root) == before
    plan = client.post("/plan", BODY)[1]
    assert [row["name"] for row in plan["expected"]] == ["a", "b", "c"]
    assert all(0 < row["explained"] < 1 for row in plan["expected"])
    without_ranks = {key: value for key, value in BODY.items() if key != "ranks"}
    assert client.post("/plan", {**without_ranks, "target": 0.5})[1]["loras_size"] > 0


def test_a_checkpoint_is_fitted_onto_a_run(client, root, run):
    code, job = client.post(
        "/fit", {"run": run, "checkpoint": NAMES[1], "name": "later", "device": "cpu", "topup": 2}
    )
    assert code == 202
    assert job["title"] == "the fit of later onto mix"
    assert client.ended(job)["run"] == "mix"
    (fit,) = client.get("/runs/mix")[1]["fits"]
    assert fit["name"] == "later"
    assert fit["topups"] == ["mix_fit-later-2"]
    assert fit["prompt"].endswith("<lora:mix_fit-later-2:1.00000>")
    assert fit["explained_with_topups"] > fit["explained"] > 0
    again = {"run": run, "checkpoint": NAMES[0], "name": "later", "device": "cpu"}
    code, answer = client.post("/fit", again)
    assert code == 400
    assert "later.json exists" in answer["detail"]
    code, job = client.post("/fit", {**again, "overwrite": True})
    assert client.ended(job)["outcome"] == "done"
    (fit,) = client.get("/runs/mix")[1]["fits"]
    assert fit["topups"] == []
    assert not (root / "Lora" / "mix_fit-later-2.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"run": "mxi"}, (404, 'did you mean "mix"?')),
        ({"run": "../mix"}, (404, "expected the name of a run")),
        ({"checkpoint": "mix"}, (400, "checkpoint: expected a name of the host's list")),
        ({"topup": "0%"}, (400, "topup: expected a rank from 1")),
        ({"name": "../later"}, (400, 'name: the path separator "/" is not allowed')),
        ({"device": "cuda:99"}, (400, "device cuda:99 was asked for")),
        ({"seed": -1}, (400, "seed: expected a whole number")),
    ],
)
def test_a_fit_that_cannot_be_is_refused_at_once(client, root, run, jobs, change, refusal):
    before = snapshot(root)
    code, answer = client.post("/fit", {"run": run, "checkpoint": NAMES[1], **change})
    assert code == refusal[0]
    assert refusal[1] in answer["detail"]
    assert jobs.known == ()
    assert snapshot(root) == before


def test_an_edited_lora_ends_a_fit_with_a_refusal(client, root, run):
    path = root / "Lora" / "mix_0-4.safetensors"
    path.write_bytes(path.read_bytes()[:-2] + b"\1\1")
    job = client.post("/fit", {"run": run, "checkpoint": NAMES[1], "name": "later"})[1]
    job = client.ended(job)
    assert job["outcome"] == "refused"
    assert "mix_0-4.safetensors was edited or replaced" in job["message"]
    assert not (root / "hyper-merge" / "mix" / "fits").exists()


def test_tab_and_api_show_each_others_jobs(client, host, jobs, endless):
    _, job = client.post("/merge", BODY)
    assert next(watch_job(jobs))[0]
    assert stop_job(jobs) == ""
    assert client.ended(job)["outcome"] == "stopped"
    jobs.start("of the tab", lambda task, progress: "mix", host.log)
    newest, older = client.get("/jobs")[1]["jobs"]
    assert newest["title"] == "of the tab"
    assert older["id"] == job["id"]
    assert client.ended(newest)["run"] == "mix"


def test_cancelling_a_job_does_not_stop_the_next_one(client, host, jobs, endless):
    first = jobs.start("first", lambda task, progress: "", host.log)
    client.ended({"id": first.id, "outcome": "running"})
    _, second = client.post("/merge", BODY)
    assert client.post(f"/jobs/{first.id}/cancel")[1]["outcome"] == "done"
    assert not client.get(f"/jobs/{second['id']}")[1]["stopping"]


@pytest.mark.parametrize("flavour", ["a1111", "forge"])
def test_a_merge_appears_in_the_webuis_lists_and_styles(root, flavour, open_client):
    process_jobs()._known.clear()
    with installed(root, flavour, api=True, api_auth="ann:secret") as webui:
        webui.load_scripts()
        client = open_client(webui.api_only())
        client.http.auth = ("ann", "secret")
        code, job = client.post("/merge", {**BODY, "save_styles": True})
        assert code == 202
        assert client.ended(job)["run"] == "mine"
        assert "mine.safetensors" in {
            c["name"] for c in client.get("/checkpoints")[1]["checkpoints"]
        }
        run = client.get("/runs/mine")[1]
        assert run["hyper_model_title"].startswith("mine.safetensors")
        assert {f"mine: {name}" for name in "abc"} <= webui.host().styles().keys()
        fit = {"run": "mine", "checkpoint": NAMES[0], "name": "later", "save_styles": True}
        assert client.ended(client.post("/fit", fit)[1])["outcome"] == "done"
        style = webui.shared.prompt_styles.styles["mine: later"]
        assert style.prompt == client.get("/runs/mine")[1]["fits"][0]["prompt"]
        assert webui.errors.reports == []
        assert not webui.queue_lock.held


@pytest.mark.parametrize("flavour", ["a1111", "forge"])
def test_a_job_waiting_for_the_webui_can_be_cancelled(root, flavour, open_client):
    process_jobs()._known.clear()
    with installed(root, flavour, api=True) as webui:
        webui.load_scripts()
        client = open_client(webui.api_only())
        with webui.queue_lock:
            _, job = client.post("/merge", BODY)
            assert (job["phase"], job["fraction"]) == ("waiting for the queue", 0)
            job = client.post(f"/jobs/{job['id']}/cancel")[1]
            assert job["outcome"] == "stopped"
        for thread in threading.enumerate():
            if thread.name == "hyper-merge":
                thread.join(60)
        assert not webui.queue_lock.held
        assert not (root / "Stable-diffusion" / "mine.safetensors").exists()


@pytest.mark.parametrize("name", ["abc", "%00", "..", "task(hyper-merge-abc)"])
def test_a_job_that_is_unknown_is_not_found(client, name):
    assert client.http.get(f"/hyper-merge/jobs/{name}").status_code == 404
    assert client.http.post(f"/hyper-merge/jobs/{name}/cancel").status_code == 404


def test_many_jobs_do_not_pile_up(client, host, jobs):
    for number in range(25):
        jobs.start(f"job {number}", lambda task, progress: "", host.log).wait(60)
    titles = [job["title"] for job in client.get("/jobs")[1]["jobs"]]
    assert titles[0] == "job 24"
    assert len(titles) == 20


def test_a_run_deleted_while_its_fit_waits_is_reported(client, root, run, monkeypatch):
    def delete_first(request, folders, progress):
        shutil.rmtree(root / "hyper-merge" / "mix")
        return run_fit(request, folders, progress)

    monkeypatch.setattr(tasks, "run_fit", delete_first)
    job = client.post("/fit", {"run": run, "checkpoint": NAMES[1], "name": "later"})[1]
    job = client.ended(job)
    assert job["outcome"] == "refused"
    assert "there is no run mix" in job["message"]
