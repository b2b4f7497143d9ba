"""AlexNet and its training recipe. Knows neither files nor images nor Ray."""
