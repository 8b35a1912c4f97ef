"""The demo's videos: python -m pytest tools/test_demo_videos.py"""

import numpy as np
import pytest

import cmaev
from tools import demo_videos


def test_classes_differ_in_motion():
    """With the same random draws, they have the same middle frame and differ in the motion around it."""
    middle, span, moves = demo_videos.DEMO_FRAMES // 2, range(8, 41), {}
    still = list(demo_videos.demo_video(0, np.random.default_rng(3), "motions"))[middle].astype(int)
    for label, name in enumerate(demo_videos.DEMO_CLASSES):
        video = np.stack(list(demo_videos.demo_video(label, np.random.default_rng(3), "motions"))).astype(int)
        assert np.array_equal(video[middle], still)
        lit = [np.argwhere(frame.sum(axis=-1) > 0.6 * still.sum(axis=-1).max()) for frame in video]
        row, column = np.array([lit[t].mean(axis=0) for t in span]).T
        next_row, next_column = np.roll(row, -1), np.roll(column, -1)
        moves[name] = dict(
            right=column[-1] - column[0], down=row[-1] - row[0], rows=np.ptp(row), columns=np.ptp(column),
            turn=(column * next_row - next_column * row).sum(),  # twice the area that the closed path goes round
            growth=len(lit[span[-1]]) / len(lit[span[0]]))
    assert moves["right"]["right"] > 10 > -10 > moves["left"]["right"]
    assert moves["down"]["down"] > 10 > -10 > moves["up"]["down"]
    assert moves["clockwise"]["turn"] > 200 > -200 > moves["counterclockwise"]["turn"]
    assert moves["growing"]["growth"] > 2 > 0.5 > moves["shrinking"]["growth"]
    assert moves["swinging"]["columns"] > 10 > 5 > moves["swinging"]["rows"]
    assert moves["bobbing"]["rows"] > 10 > 5 > moves["bobbing"]["columns"]


@pytest.mark.parametrize("kind, per_pair, in_all", [
    ("scenes", 24, 120), ("motions", 8, 8), ("looks", 250, 1250)])
def test_looks_tell_what_they_should(monkeypatch, kind, per_pair, in_all):
    """Backgrounds and shapes of 250 videos of each pair of classes, as the frames ask for them."""
    drawn, demo_texture, signed_distance = [], demo_videos.demo_texture, demo_videos.signed_distance

    def noted_texture(*arguments):
        texture = demo_texture(*arguments)
        drawn.append(tuple(texture(np.zeros((2, 1)))[:, 0]))
        return texture

    def noted_distance(shape, points):
        drawn.append(shape)
        return signed_distance(shape, points)
    monkeypatch.setattr(demo_videos, "demo_texture", noted_texture)
    monkeypatch.setattr(demo_videos, "signed_distance", noted_distance)
    monkeypatch.setattr(demo_videos, "DEMO_SIDE", 2)
    looks = [set() for _ in range(5)]
    for i in range(1250):
        drawn.clear()
        next(demo_videos.demo_video(i % 10, np.random.default_rng(i), kind))
        background, _, shape = drawn
        looks[i % 10 // 2].add((background, shape))
    assert [len(group) for group in looks] == 5 * [per_pair] and len(set.union(*looks)) == in_all
    shapes = [{shape for _, shape in group} for group in looks]
    assert all(len(group) == 1 for group in shapes) == (kind == "scenes")
    assert set.union(*shapes) <= set(demo_videos.DEMO_SHAPES)


def test_videos_are_a_pure_function(tmp_path):
    """The files of many threads are those of one, however fast the frames come. An error leaves no videos."""
    blocked = tmp_path / "demo.partial" / "train" / "up" / "00002.mp4"
    blocked.mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        demo_videos.make_demo(tmp_path / "demo", train=12, val=1)
    assert not (tmp_path / "demo").exists()
    blocked.rmdir()
    demo_videos.make_demo(tmp_path / "demo", train=12, val=1)
    videos = cmaev.read_list(tmp_path / "demo" / "train.txt")
    assert [label for _, label in videos] == [*range(10), 0, 1]
    for i, (path, label) in enumerate(videos):
        frames = list(demo_videos.demo_video(label, np.random.default_rng((0, 0, i)), "motions"))
        demo_videos.write_video(tmp_path / "again.mp4", frames)
        with open(path, "rb") as file:
            assert (tmp_path / "again.mp4").read_bytes() == file.read()
        decoded = cmaev.Video(path).read(range(48)).numpy()
        assert np.abs(decoded - np.stack(frames).astype(float)).mean() < 12  # H.264's losses
