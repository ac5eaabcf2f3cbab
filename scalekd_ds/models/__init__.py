"""timm models: by name, with weights of any trainer, and with the card that says what they are."""
