#!/usr/bin/env bash
# Guess: an environment's observations lie in its observation space; Gymnasium asks for that.
# Seen: Meta-World's MT1, whose observations hold the goal, has an observation space where the last three numbers are 0:
# the space is made when the environment is, for a hidden goal, and kept. So each observation with another goal lies
# outside. Wrappers that clip or rescale by the space erase the goal. The environment's own step() clips by a second
# space, `sawyer_observation_space`, that is kept from its first use on: where the goal is made visible by hand after
# that (`_partially_observable = False`), reset() shows the goal and step() a goal of 0, and the scripted policies fail.
# Versions: metaworld 3.1.1, gymnasium 1.4.0, mujoco 3.3.0.
# Hurts: normalization by the space, buffers and networks that take ranges from it, policies on changed environments.
# Source: metaworld/sawyer_xyz_env.py, sawyer_observation_space (a cached property).
set -eu
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
if [ -z "${FINDINGS_PYTHON:-}" ]; then
    python3 -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet metaworld==3.1.1 gymnasium==1.4.0 mujoco==3.3.0 numpy==2.4.6 packaging==26.4
    FINDINGS_PYTHON=$folder/venv/bin/python
fi
cd "$folder"
"$FINDINGS_PYTHON" - <<'PY'
import sys
import warnings
from importlib.metadata import version

warnings.simplefilter("ignore")
import gymnasium
import metaworld
import numpy as np

pins = {"metaworld": "3.1.1", "gymnasium": "1.4.0", "mujoco": "3.3.0"}
assert {name: version(name) for name in pins} == pins, {name: version(name) for name in pins}
print(pins)
seen = {}
for task in ("plate-slide-v3", "door-close-v3", "reach-v3"):
    env = gymnasium.make("Meta-World/MT1", env_name=task, seed=1)
    first, _ = env.reset()
    second = env.step(np.zeros(4, np.float32))[0]
    space = env.observation_space
    rescaled = gymnasium.wrappers.TransformObservation(env, lambda x: np.clip(x, space.low, space.high), space)
    clipped, _ = rescaled.reset()
    seen[task] = [space.contains(first), space.contains(second), bool(first[-3:].any()), bool(clipped[-3:].any())]
    print(f"{task}: goal {first[-3:].round(3)}, the space's {space.low[-3:]} to {space.high[-3:]}; contains the "
          f"observations of reset() and step(): {seen[task][:2]}; the goal clipped by the space: {clipped[-3:]}")
sys.exit(0 if set(map(tuple, seen.values())) == {(False, False, True, False)} else "the behaviour has changed")
PY
