"""Watching the writing: frames from streams, the animation, and the view that follows."""

import numpy as np
import pytest
from PIL import Image
from test_pictures import photo
from tiny import model

from jpeglm_jax.codecs import jpeg
from jpeglm_jax.config import JpegConfig
from jpeglm_jax.sampling import live, sheets
from jpeglm_jax.sampling.generate import Request, generate
from jpeglm_jax.sampling.rules import Sampler
from jpeglm_jax.tokenizer import BOS


def written(codec, count=3):
    size = codec.config.size
    pictures = [photo(size, size).rotate(90 * number) for number in range(count)]
    return [codec.encode(np.asarray(picture.convert("RGB"))) for picture in pictures]


def grid_of(codec, streams):
    return sheets.grid([codec.decode(stream).picture for stream in streams])


@pytest.mark.parametrize("subsampling", list(jpeg.MCU_SIZES))
@pytest.mark.parametrize("restart", [True, False])
def test_frames_go_from_grey_to_the_finished_pictures(subsampling, restart):
    codec = jpeg.Codec(JpegConfig(size=40, subsampling=subsampling, restart=restart))
    streams = written(codec)
    frames = list(live.frames(codec, streams))
    assert len(frames) == codec.mcu_count + 1
    assert np.array_equal(frames[-1], grid_of(codec, streams))
    if restart:
        grey = np.full((40, 40, 3), 128, np.uint8)
        assert np.array_equal(frames[0], sheets.grid([grey] * 3))
        for number, frame in enumerate(frames):
            assert np.array_equal(frame, grid_of(codec, [codec.prefix(s, number / codec.mcu_count) for s in streams]))


def test_frames_begin_where_the_prompt_ends():
    codec = jpeg.Codec(JpegConfig(size=48))  # 9 MCUs, of which half are 4
    streams = written(codec)
    frames = list(live.frames(codec, streams, ratio=0.5))
    assert len(frames) == 6
    assert np.array_equal(frames[0], grid_of(codec, [codec.prefix(stream, 0.5) for stream in streams]))


def test_a_stream_that_ends_early_stays_as_it_is():
    codec = jpeg.Codec(JpegConfig(size=48))
    (stream,) = written(codec, 1)
    cut = codec.prefix(stream, 0.5)
    frames = list(live.frames(codec, [cut]))
    assert len(frames) == 10 and np.array_equal(frames[4], frames[-1])
    assert np.array_equal(frames[-1], grid_of(codec, [cut]))


def test_the_animation_has_every_frame_and_holds_the_last(tmp_path):
    codec = jpeg.Codec(JpegConfig(size=256))
    path = tmp_path / "writing.gif"
    live.save_gif(path, live.frames(codec, written(codec, 10)))
    with Image.open(path) as animation:
        assert animation.n_frames == live.FRAMES and max(animation.size) == live.WIDEST
        animation.seek(live.FRAMES - 1)
        assert animation.info["duration"] == live.LAST_MS


def test_the_view_follows_and_leaves_time_for_the_writing(tmp_path, monkeypatch):
    codec = jpeg.Codec(JpegConfig(size=48))
    streams = written(codec, 2)
    path = tmp_path / "out" / "live.png"
    follow = live.follow(codec, [stream[:0] for stream in streams], live.in_file(path))
    follow({1: codec.prefix(streams[1], 0.5)})
    seen = np.asarray(Image.open(path))
    assert np.array_equal(seen, grid_of(codec, [streams[0][:0], codec.prefix(streams[1], 0.5)]))
    follow({1: streams[1]})  # too soon to draw again
    assert np.array_equal(np.asarray(Image.open(path)), seen)
    monkeypatch.setattr(live, "PAUSE", 0)
    follow({0: streams[0]})
    assert np.array_equal(np.asarray(Image.open(path)), grid_of(codec, streams))
    assert [file.name for file in path.parent.iterdir()] == ["live.png"]


def test_shorter_chunks_are_more_looks_at_the_same_samples(one_device):
    requests = [Request(np.array([BOS], np.int32), seed, 100) for seed in range(3)]
    looks = {16: [], 128: []}
    samples = [generate(model(), requests, Sampler(), None, 3, n, seen.append) for n, seen in looks.items()]
    tokens = [[sample.tokens.tolist() for sample in each] for each in samples]
    assert tokens[0] == tokens[1]
    longest = max(map(len, tokens[0])) - 1  # written
    assert len(looks[16]) == -(-longest // 16) and len(looks[128]) == 1
