"""The table of third-party weights, with source, licence and hash of each file."""

from __future__ import annotations

from dataclasses import dataclass

from tccp.errors import TccpError


@dataclass(frozen=True)
class Weight:
    """One file of weights.

    label: the network in words, for messages. sha256, size_bytes: of the published file, None if unknown.
    other_names: further file names in use. extra: the optional dependencies of this package that include the code which
    reads the file. alternative: advice for users who cannot get the file.
    """

    name: str
    file: str
    label: str
    purpose: str
    url: str
    licence: str
    extra: str
    sha256: str | None = None
    size_bytes: int | None = None
    other_names: tuple[str, ...] = ()
    alternative: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.file, *self.other_names)


WEIGHTS: dict[str, Weight] = {
    weight.name: weight
    for weight in (
        Weight(
            "mediapipe",
            "face_landmarker.task",
            "face landmark",
            "faces and landmarks, backend mediapipe",
            "https://storage.googleapis.com/mediapipe-models/face_landmarker/face_landmarker/float16/1/face_landmarker.task",
            "Apache-2.0",
            "preprocess",
            "64184e229b263107bc2b804c6625db1341ff2bb731874b0bcc2fe6544e0bc9ff",
            3_758_596,
            alternative="in `tccp generate`, use --detector lbp, which needs no download",
        ),
        Weight(
            "fan",
            "2DFAN4-11f355bf06.pth.tar",  # for face-alignment 1.5; earlier versions used a TorchScript zip
            "FAN landmark",
            "landmarks, backend fan",
            "https://www.adrianbulat.com/downloads/python-fan/2DFAN4-11f355bf06.pth.tar",
            "BSD-3-Clause",
            "preprocess",
            "11f355bf0693120222f5955ce3f9dc8fb5763ebb30a47d7906e509490d32e4aa",
            alternative="use the backend mediapipe or lbp",
        ),
        Weight(
            "s3fd",
            "s3fd-619a316812.pth",
            "S3FD face detector",
            "faces, backend fan",
            "https://www.adrianbulat.com/downloads/python-fan/s3fd-619a316812.pth",
            "BSD-3-Clause; training data for research only",
            "preprocess",
            "619a31681264d3f7f7fc7a16a42cbbe8b23f31a256f75a366e5a1bcd59b33543",
            89_843_225,
            other_names=("s3fd.pth",),
            alternative="use the backend mediapipe or lbp",
        ),
        Weight(
            "light-asd",
            "finetuning_TalkSet.model",
            "active speaker (Light-ASD)",
            "finding the speaker among several people",
            "https://github.com/Junhua-Liao/Light-ASD/raw/ed38c232de5efe0261dbd68627c0ade7cdfe14eb/weight/finetuning_TalkSet.model",
            "MIT; training data for research only",
            "preprocess",
            "efc375833887eefa9d209dc92810e18519b04c3c73ea35a549f2a7f40b7d94d5",
            4_175_289,
            other_names=("light_asd_finetuning_TalkSet.model",),
        ),
        Weight(
            "silero-vad",
            "silero_vad.onnx",
            "voice activity (Silero VAD)",
            "finding when speech is heard",
            "https://github.com/snakers4/silero-vad/raw/v6.2.1/src/silero_vad/data/silero_vad.onnx",
            "MIT",
            "preprocess",
            "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3",
            2_327_524,
        ),
        Weight(
            "syncnet",
            "syncnet_v2.model",
            "SyncNet",
            "offset and confidence of lips and sound",
            "https://www.robots.ox.ac.uk/~vgg/software/lipsync/data/syncnet_v2.model",
            "MIT; training data for research only",
            "preprocess",
            "961e8696f888fce4f3f3a6c3d5b3267cf5b343100b238e79b2659bff2c605442",
            54_573_114,
        ),
        Weight(
            "sface",
            "face_recognition_sface_2021dec.onnx",
            "face recognition (SFace)",
            "recognising a person's face again",
            "https://media.githubusercontent.com/media/opencv/opencv_zoo/47534e27c9851bb1128ccc0102f1145e27f23f98/models/face_recognition_sface/face_recognition_sface_2021dec.onnx",
            "Apache-2.0",
            "preprocess",
            "0ba9fbfa01b5270c96627c4ef784da859931e02f04419c829e83484087c34e79",
            38_696_353,
        ),
        Weight(
            "wav2lip",
            "wav2lip.pth",
            "Wav2Lip",
            "lip references, lips.source=wav2lip",
            "https://iiitaphyd-my.sharepoint.com/:u:/g/personal/radrabha_m_research_iiit_ac_in/Eb3LEzbfuKlJiR600lQWRxgBIY27JZg80f7V9jtMfbNDaQ?download=1",
            "research and personal use only",
            "train",
            "b78b681b68ad9fe6c6fb1debc6ff43ad05834a8af8a62ffc4167b7b34ef63c37",
            435_807_851,
            alternative="set lips.source=liplet, which is trained here",
        ),
    )
}


def entry(which: str | Weight) -> Weight:
    """The table's entry of this name. Raises TccpError that lists the known names if there is none."""
    if isinstance(which, Weight):
        return which
    if which not in WEIGHTS:
        raise TccpError(f"unknown weights {which!r}: choose one of {', '.join(WEIGHTS)}")
    return WEIGHTS[which]
