"""Rendered people: a face set that needs no download, with any number of identities and known image quality.

It shows that losses, memory and quality weighting work on face-shaped data; it is not evidence about real faces.
"""

from protomem.data.faces.pairs import FIRST_IDENTITY, PAIR_OPTIONS, write_face_pairs
from protomem.data.faces.render import render_faces
from protomem.data.faces.scene import DEGRADATIONS, ImageOptions
from protomem.data.faces.synth import contact_sheet, write_face_set

__all__ = [
    "DEGRADATIONS",
    "FIRST_IDENTITY",
    "ImageOptions",
    "PAIR_OPTIONS",
    "contact_sheet",
    "render_faces",
    "write_face_pairs",
    "write_face_set",
]
