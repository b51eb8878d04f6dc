"""What a layer is: networks as text, their axes, geometry and ranks. No tensors here."""
