"""Renders labelled videos of a robot arm from Meta-World's scripted policies: five pairs of opposite tasks.

    pip install metaworld==3.1.1 mujoco==3.3.0 packaging     and Debian's libosmesa6; on a GPU MUJOCO_GL=egl
    python -m experiments.robot_videos data/robot            run again, it goes on where it stopped

Writes data/robot/{train,val}/class/*.mp4 (H.264), the lists train.txt and val.txt, and the same in data/robot/still,
where a video is its middle frame alone. Labels 2k and 2k + 1 are a pair: one scene, two directions. A video shows the
object's way over a random 70 to 100 % of a given distance, at even steps of time. Half of the videos are episodes of
the pair's other task played backwards: a single frame tells the pair but not the class. The goal's marker is hidden.
Video i of a split is a pure function of (seed, split, i) on one machine.
"""

import functools
import multiprocessing
import os
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cmaev  # before mujoco: after it has loaded OSMesa, and with that LLVM, torch's triton crashes
from tools.demo_videos import write_video

import numpy as np

os.environ.setdefault("MUJOCO_GL", "osmesa")
os.environ.setdefault("LP_NUM_THREADS", "1")  # OSMesa's
try:
    import mujoco
    from gymnasium.spaces import Box
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from metaworld.policies import ENV_POLICY_MAP
except ImportError as error:
    sys.exit(f"{error}: pip install metaworld==3.1.1 mujoco==3.3.0 packaging")

SCENES = (  # two tasks; the qpos column of the object's coordinate, None: the mug's distance to a point before the
    # machine; its first and last value in the first task, metres or radians; where the cameras look
    ("drawer-open", "drawer-close", 9, (-0.02, -0.14), (0, 0.7, 0.1)),
    ("door-open", "door-close", 9, (-0.15, -1.25), (-0.05, 0.72, 0.15)),
    ("window-open", "window-close", 9, (0.015, 0.185), (0, 0.75, 0.15)),
    ("plate-slide", "plate-slide-back", 10, (0.03, 0.13), (0, 0.7, 0.05)),
    ("coffee-push", "coffee-pull", None, (0.13, 0.05), (0, 0.7, 0.1)))
TASKS = [(task, *rest) for first, second, *rest in SCENES for task in (first, second)]
PLACES = {  # corners of the box of start positions, where Meta-World's own box tells the class
    "window-close": ((-0.1, 0.7, 0.16), (0.1, 0.9, 0.16)),
    "plate-slide": ((0, 0.6, 0, -0.05, 0.85, 0), (0, 0.6, 0, 0.05, 0.9, 0)),
    "plate-slide-back": ((0, 0.85, 0, -0.05, 0.6, 0.015), (0, 0.85, 0, 0.05, 0.6, 0.015))}
AZIMUTHS = (120, 145, 170)  # of the cameras, in degrees: on the arm's right
ZOOM = 2  # a frame is rendered this much larger and averaged
STEPS, AFTER, TRIES = 200, 20, 30  # most steps; steps after success; most episodes per video


@functools.cache
def stage(task, side):
    """The task's environment, its renderer, the renderer's options; once per process."""
    env = ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
    env._freeze_rand_vec, env.seeded_rand_vec, env._set_task_called = False, True, True
    env._partially_observable = False
    del env.sawyer_observation_space  # cached for a hidden goal: step() would clip the goal to 0
    if task in PLACES:
        env._random_reset_space = Box(*np.array(PLACES[task]), dtype=np.float64)
    env.model.light_castshadow[:] = 0  # shadows: six times the time
    env.model.vis.quality.offsamples = 0
    renderer = mujoco.Renderer(env.model, ZOOM * side, ZOOM * side)
    renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
    options = mujoco.MjvOption()
    options.sitegroup[:] = 0  # hides the goal's marker
    return env, renderer, options


def episode(env, task, column, rng):
    """Runs the policy -> qpos [steps, n], the object's coordinate [steps]."""
    env.seed(int(rng.integers(2 ** 31)))
    observed, _ = env.reset()
    if task == "plate-slide-back":  # the net stands where it does in plate-slide
        env.model.body("puck_goal").pos = rng.uniform((-0.05, 0.85, 0), (0.05, 0.9, 0))
    policy, states, after = ENV_POLICY_MAP[f"{task}-v3"](), [env.data.qpos.copy()], 0
    while after < AFTER and len(states) < STEPS:
        with warnings.catch_warnings(action="ignore"):  # "Constant(s) may be too high"
            action = np.clip(policy.get_action(observed), -1, 1).astype(np.float32)
        observed, _, _, _, info = env.step(action)
        states.append(env.data.qpos.copy())
        after += bool(after or info["success"])
    states = np.stack(states)
    if column is not None:
        return states, states[:, column]
    under = env.model.body("coffee_machine").pos[:2] - (0, 0.22)
    return states, np.linalg.norm(states[:, :2] - under, axis=1)


def crossings(coordinate, start, end):
    """The fractional steps where a coordinate [steps] leaves `start` and then reaches `end`; None: it does not."""
    progress = (coordinate - start) / (end - start)
    reached = int((progress >= 1).argmax())
    before = np.flatnonzero(progress[:reached] <= 0)[-1:]
    if len(before):
        steps = np.arange(before[0], reached + 1)
        return np.interp((0, 1), progress[steps], steps)


def robot_video(label, rng, frames, side):
    """The frames of one video, uint8 [H, W, 3] each."""
    played = label ^ int(rng.integers(2))  # the task that runs; played backwards if not the label's
    task, column, (near, far), look_at = TASKS[played]
    env, renderer, options = stage(task, side)
    length = rng.uniform(0.7, 1)
    ends = near + (far - near) * (rng.uniform(0, 1 - length) + np.array((0, length)))
    camera = mujoco.MjvCamera()
    camera.azimuth, camera.elevation = rng.choice(AZIMUTHS) + rng.uniform(-8, 8), rng.uniform(-40, -24)
    camera.distance, camera.lookat[:] = rng.uniform(0.6, 0.75), look_at + rng.uniform(-0.04, 0.04, 3)
    for _ in range(TRIES):
        states, coordinate = episode(env, task, column, rng)
        steps = crossings(coordinate, *(ends[::-1] if played % 2 else ends))
        if steps is not None:
            break
    else:
        raise cmaev.CMAEVError(f"{task} failed {TRIES} times: install metaworld 3.1.1 and mujoco 3.3.0")
    for step in np.linspace(*(steps if played == label else steps[::-1]), frames):
        i = min(int(step), len(states) - 2)
        env.data.qpos[:] = states[i] + (step - i) * (states[i + 1] - states[i])
        mujoco.mj_forward(env.model, env.data)
        renderer.update_scene(env.data, camera, options)
        pixels = renderer.render().reshape(side, ZOOM, side, ZOOM, 3)
        yield pixels.mean(axis=(1, 3)).round().astype(np.uint8)


def write(folder, frames, side, job):
    """Writes folder/file and, last, folder/still/file, unless they exist."""
    file, label, key = job
    for path in (folder / file, folder / "still" / file):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}")
            if path == folder / file:
                write_video(partial, robot_video(label, np.random.default_rng(key), frames, side))
            else:
                write_video(partial, cmaev.Video(folder / file).read([frames // 2]).numpy())
            os.replace(partial, path)


def main():
    parser = cmaev.argument_parser(__doc__)
    add = parser.add_argument
    add("folder", type=Path, help="where to write")
    add("--train", type=cmaev.WHOLE, default=1000, help="videos to train on")
    add("--val", type=cmaev.WHOLE, default=500, help="videos to test on")
    add("--seed", type=cmaev.WHOLE, default=0)
    add("--frames", type=cmaev.COUNT, default=48, help="for recipe small: 72")
    add("--side", type=cmaev.COUNT, default=96, help="height and width, even; for recipe small: 128")
    add("--processes", type=cmaev.COUNT, default=os.cpu_count(), help="each takes 2 GB of memory")
    s = parser.parse_args()
    settings = s.folder / f"seed-{s.seed}-{s.frames}x{s.side}x{s.side}"  # its name records the settings
    if s.folder.exists() and not settings.exists():
        raise cmaev.CMAEVError(f"{s.folder} holds other files: give a new folder")
    settings.mkdir(parents=True, exist_ok=True)
    todo = []
    for split, (name, count) in enumerate((("train", s.train), ("val", s.val))):
        files = [(f"{name}/{TASKS[i % len(TASKS)][0]}/{i:05d}.mp4", i % len(TASKS)) for i in range(count)]
        todo += [(file, label, (s.seed, split, i)) for i, (file, label) in enumerate(files)
                 if not (s.folder / "still" / file).exists()]
        for folder in (s.folder, s.folder / "still"):
            folder.mkdir(exist_ok=True)
            (folder / f"{name}.txt").write_text("".join(f"{file} {label}\n" for file, label in files))
    start = time.time()
    with ProcessPoolExecutor(s.processes, multiprocessing.get_context("spawn")) as pool:
        for done, _ in enumerate(pool.map(functools.partial(write, s.folder, s.frames, s.side), todo), 1):
            if done % 50 == 0:
                left = (time.time() - start) * (len(todo) / done - 1) / 60
                print(f"{done} of {len(todo)} videos, {left:.0f} minutes left", flush=True)


if __name__ == "__main__":
    cmaev.run_script(main)
