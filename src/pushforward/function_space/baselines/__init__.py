"""What a distance without the data is measured against: the data, some of them, the tangent."""
