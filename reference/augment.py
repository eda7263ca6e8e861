"""Augmentation of log-mel batches: other throats, rooms, microphones and telephones, at almost no
cost.

Everything acts on un-normalised log-mel power (B, T, M) as NemoMel.log_mel gives it, so that one
synthesised recording serves many times. Noise and echo are added as powers (cross terms neglected).
Rates, ranges and odds are our choices.
"""

import math

import torch
import torch.nn.functional as F

from tiny_align.runtime.front_ends.nemo import MIN_LOUD, QUIET_SHARE, STD_GUARD, NemoMel

DB = math.log(10) / 10  # natural-log power per decibel
PAD = -16.6  # log of the front end's guard: digital silence


def _resample(x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """x (B, T, M) read along T at the fractional positions `where` (B, T')."""
    where = where.clamp(0, x.shape[1] - 1)
    low = where.floor().long().clamp(max=x.shape[1] - 2) if x.shape[1] > 1 else where.long()
    share = (where - low).unsqueeze(-1)
    index = low.unsqueeze(-1).expand(-1, -1, x.shape[2])
    high = (index + 1).clamp(max=x.shape[1] - 1)
    return x.gather(1, index) * (1 - share) + x.gather(1, high) * share


def _uniform(n: int, low: float, high: float) -> torch.Tensor:
    return torch.empty(n).uniform_(low, high)


def _smooth_curve(n: int, length: int, knots: int, scale: float) -> torch.Tensor:
    """(n, length): random curves through `knots` normal points of standard deviation `scale`."""
    return F.interpolate(
        torch.randn(n, 1, knots) * scale, size=length, mode="linear", align_corners=True
    )[:, 0]


def stretch(x: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Speak faster and slower, unevenly, between silences of random length."""
    n = len(x)
    speed = _uniform(n, 0.78, 1.25)
    head, tail = _uniform(n, 0, 25).long(), _uniform(n, 0, 25).long()
    spoken = (lengths / speed).long().clamp(min=4)
    new_lengths = head + spoken + tail
    longest = int(new_lengths.max())
    position = torch.arange(longest).float() - head.unsqueeze(1)
    wobble = _smooth_curve(n, longest, max(6, longest // 25), 4.0)
    where = position / spoken.unsqueeze(1) * lengths.unsqueeze(1) + wobble
    out = _resample(x, torch.minimum(where, (lengths - 1).unsqueeze(1)))
    silent = (position < 0) | (position >= spoken.unsqueeze(1))
    return torch.where(silent.unsqueeze(-1), torch.tensor(PAD), out), new_lengths


def warp_tract(
    x: torch.Tensor, slope=(0.84, 1.2), shift: float = 2.5, wobble: float = 0.7
) -> torch.Tensor:
    """Other vocal tracts: the mel axis read stretched, shifted and, formant by formant, a little
    elsewhere.

    On Slaney's scale a shorter tract is a stretch below 1 kHz and a shift above; the two are drawn
    freely. `shift` and `wobble` are in mel bands.
    """
    n, _, n_mels = x.shape
    band, pivot = torch.arange(n_mels).float(), n_mels / 4  # about 800 Hz
    where = (
        (band - pivot) * _uniform(n, *slope).unsqueeze(1)
        + pivot
        + _uniform(n, -shift, shift).unsqueeze(1)
    )
    where = where + _smooth_curve(n, n_mels, 5, wobble)
    return _resample(x.transpose(1, 2), where).transpose(1, 2)


def _smooth_field(n: int, length: int, n_mels: int, scale: torch.Tensor) -> torch.Tensor:
    """(n, length, n_mels): random surfaces through normal points every 0.15 s and 13 mels, `scale`
    (n,) of each.
    """
    knots = (
        torch.randn(n, 1, max(2, length // 15), max(2, n_mels // 13)) * scale[:, None, None, None]
    )
    return F.interpolate(knots, size=(length, n_mels), mode="bilinear", align_corners=True)[:, 0]


def realise(x: torch.Tensor, shift: float = 1.2, gain_db: float = 4.0) -> torch.Tensor:
    """Every sound made a little differently: formants move and swell from moment to moment, by up
    to `shift` mels and `gain_db` (standard deviations). A synthesiser makes a sound one way; people
    don't."""
    n, length, n_mels = x.shape
    where = torch.arange(n_mels).float() + _smooth_field(n, length, n_mels, _uniform(n, 0, shift))
    x = _resample(x.flatten(0, 1).unsqueeze(-1), where.flatten(0, 1)).view(n, length, n_mels)
    return x + _smooth_field(n, length, n_mels, _uniform(n, 0, gain_db) * DB)


def color(x: torch.Tensor) -> torch.Tensor:
    """A microphone's response, a sharper or duller voice, and smoother transitions for some."""
    x = x + _smooth_curve(len(x), x.shape[2], 7, 5 * DB).unsqueeze(1)
    mean = x.mean(dim=2, keepdim=True)
    x = mean + (x - mean) * _uniform(len(x), 0.7, 1.25)[:, None, None]
    soft = F.avg_pool2d(x.unsqueeze(1), (5, 3), stride=1, padding=(2, 1), count_include_pad=False)[
        :, 0
    ]
    share = _uniform(len(x), -0.5, 0.9).clamp(min=0)[:, None, None]
    return x * (1 - share) + soft * share


def echo(power: torch.Tensor, odds: float = 0.4) -> torch.Tensor:
    """A room: power spread over the following frames, decaying 60 dB within 0.1 to 0.7 s."""
    n, length, n_mels = power.shape
    decay = torch.exp(
        -math.log(1e6) * torch.arange(60).float() / (_uniform(n, 10, 70).unsqueeze(1))
    )
    kernel = decay * _uniform(n, 0.02, 0.25).unsqueeze(1)
    kernel[:, 0] = 1.0
    kernel[torch.rand(n) > odds, 1:] = 0.0
    columns = F.pad(power.permute(2, 0, 1), (59, 0))  # (M, B, T + 59)
    return F.conv1d(columns, kernel.flip(1).unsqueeze(1), groups=n).permute(1, 2, 0)


def noise(power: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Coloured noise at -5..50 dB below the speech, sometimes other people's talk."""
    n, length, n_mels = power.shape
    level = power.sum(dim=(1, 2)) / (lengths * n_mels)
    hiss = torch.exp(_smooth_curve(n, n_mels, 5, 8 * DB)).unsqueeze(1)
    hiss = (
        hiss * torch.rand(n, length, n_mels).clamp(min=1e-4).log().neg()
    )  # the power of Gaussian noise
    hiss = hiss / hiss.mean(dim=(1, 2), keepdim=True)
    snr_db = torch.where(torch.rand(n) < 0.6, _uniform(n, 3, 30), _uniform(n, 30, 55))
    out = power + hiss * (level * 10 ** (-snr_db / 10))[:, None, None]
    others = power.roll(1, dims=0) * (level / level.roll(1))[:, None, None]
    talk_db = torch.where(torch.rand(n) < 0.15, _uniform(n, 8, 25), torch.tensor(90.0))
    return out + others * (10 ** (-talk_db / 10))[:, None, None]


def gate(
    power: torch.Tensor, clean: torch.Tensor, odds: float = 0.4, hold: int = 12
) -> torch.Tensor:
    """Nothing between the words, as noise suppression and cut recordings leave it: `power` where
    `clean` is loud.

    The gate opens and closes by up to `hold` frames too soon or too late, so that a noise is heard
    around the words.
    """
    n = len(power)
    depth_db = torch.where(torch.rand(n) < odds, _uniform(n, 15, 45), torch.tensor(300.0))
    edge = clean.amax(dim=(1, 2)) * 10 ** (-depth_db / 10)
    near = _frames_to_open(clean.amax(dim=2) >= edge.unsqueeze(1))
    held = torch.randint(-2, hold + 1, (n, 1))
    return power * (near <= held).unsqueeze(-1)


def _frames_to_open(is_open: torch.Tensor) -> torch.Tensor:
    """(B, T) where a gate is open -> (B, T) frames to the next place where it is; inside, minus
    those to a closed one, but for one: 0 on the last open frame. So `<= k` opens it k frames
    earlier and longer, or later and shorter."""
    return _frames_to(is_open) - (_frames_to(~is_open) - 1).clamp(min=0)


def _frames_to(there: torch.Tensor) -> torch.Tensor:
    """(B, T) -> (B, T): frames to the nearest place that is `there`, before or after.

    T where none is.
    """
    length = there.shape[1]
    place = torch.arange(length).expand_as(there)
    before = torch.where(there, place, -length).cummax(dim=1).values
    after = -torch.where(there, -place, -2 * length).flip(1).cummax(dim=1).values.flip(1)
    return torch.minimum(place - before, after - place).clamp(max=length)


def telephone(x: torch.Tensor, odds: float = 0.4) -> torch.Tensor:
    """Nothing above 3.3-4.2 kHz (of 80 Slaney mels up to 8 kHz), for some nothing below 200 Hz or
    so.
    """
    n, _, n_mels = x.shape
    band = torch.arange(n_mels).unsqueeze(0)
    top = torch.where(
        torch.rand(n) < odds, _uniform(n, 0.68, 0.77) * n_mels, torch.tensor(float(n_mels))
    )
    bottom = torch.where(torch.rand(n) < odds / 2, _uniform(n, 2, 7), torch.tensor(0.0))
    outside = (band >= top.unsqueeze(1)) | (band < bottom.unsqueeze(1))
    return torch.where(outside.unsqueeze(1), x - _uniform(n, 30, 90)[:, None, None] * DB, x)


def augment(log_mel: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, T, M) log-mel and (B,) frame counts -> another (B, T', M) and its frame counts."""
    x, lengths = stretch(log_mel, lengths)
    x = color(realise(warp_tract(x)))
    mask = (torch.arange(x.shape[1]).unsqueeze(0) < lengths.unsqueeze(1)).unsqueeze(-1)
    power = echo(torch.exp(x) * mask)
    power = gate(noise(power, lengths), power)
    return telephone(torch.log(power + math.exp(PAD))), lengths


def normalise(x: torch.Tensor, lengths: torch.Tensor, front_end: NemoMel) -> torch.Tensor:
    """`front_end.finish` for a padded batch (B, T, M), whose padding becomes 0."""
    mask = torch.arange(x.shape[1]).unsqueeze(0) < lengths.unsqueeze(1)  # (B, T)
    x = x.masked_fill(~mask.unsqueeze(-1), -1e9)
    x = torch.maximum(x, x.amax(dim=(1, 2), keepdim=True) - front_end.floor_db * DB)
    level = x.amax(dim=2).masked_fill(~mask, -1e9)
    rising = level.sort(dim=1).values  # what is padding comes first
    before = x.shape[1] - lengths
    quiet = rising.gather(1, (before + (QUIET_SHARE * (lengths - 1)).long()).unsqueeze(1))
    edge = quiet + front_end.speech_share * (rising[:, -1:] - quiet)
    quietest_loud = rising.gather(1, (x.shape[1] - lengths.clamp(max=MIN_LOUD)).unsqueeze(1))
    loud = (mask & (level >= torch.minimum(edge, quietest_loud))).unsqueeze(-1)
    count = loud.sum(dim=1, keepdim=True)
    mean = (x * loud).sum(dim=1, keepdim=True) / count
    var = (((x - mean) * loud) ** 2).sum(dim=1, keepdim=True) / (count - 1)
    return (x - mean) / (var.sqrt() + STD_GUARD) * mask.unsqueeze(-1)


def spec_augment(x: torch.Tensor, lengths: torch.Tensor, n_masks: int = 3) -> torch.Tensor:
    """SpecAugment (arXiv 1904.08779): hide some bands and some moments; zero is the mean here."""
    n, length, n_mels = x.shape
    time, band = torch.arange(length).unsqueeze(0), torch.arange(n_mels).unsqueeze(0)
    for _ in range(n_masks):
        start, width = torch.rand(n) * lengths, _uniform(n, 0, 16)
        x = x.masked_fill(
            ((time >= start[:, None]) & (time < (start + width)[:, None])).unsqueeze(-1), 0.0
        )
        start, width = torch.rand(n) * n_mels, _uniform(n, 0, 14)
        x = x.masked_fill(
            ((band >= start[:, None]) & (band < (start + width)[:, None])).unsqueeze(1), 0.0
        )
    return x
