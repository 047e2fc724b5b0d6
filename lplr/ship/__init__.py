"""What leaves the house: a compressed folder pushed to the Hub, or exported to the formats of other engines."""
