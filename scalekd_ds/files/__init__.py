"""Files as such: written so that they outlive a crash, and told from what they are mistaken for."""
