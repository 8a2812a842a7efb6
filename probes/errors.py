"""What can go wrong with a probe.

ProbeError
├── EncoderError    the encoder cannot be found, or is not the one that was asked for
├── ArtifactError   a probe artifact must not be used: damaged, of another format, or made for another encoder
├── CertificateError  these rows prove nothing, or a certificate belongs to another artifact
└── TableError      a training table cannot be used as given
"""


class ProbeError(Exception):
    """Base of all errors raised here; the message names the field, the value and the fix."""


class EncoderError(ProbeError):
    """Point `encoder` at a usable model folder, or install the default one."""


class ArtifactError(ProbeError):
    """Refit or restore the artifact; it was not loaded."""


class CertificateError(ProbeError):
    """Give more or better rows, ask for a larger alpha, or certify the artifact anew."""


class TableError(ProbeError):
    """Correct the table or the column names."""
