"""Pictures and messages as clients send them."""

import base64
import io

from PIL import Image, ImageDraw


def picture(colour="red", size=64):
    image = Image.new("RGB", (size, size), "white")
    ImageDraw.Draw(image).ellipse((8, 8, size - 8, size - 8), fill=colour)
    return image


def data_url(image, form="PNG"):
    file = io.BytesIO()
    image.save(file, form)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def asked(text, *pictures):
    """Messages of one user's message, pictures first."""
    parts = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
