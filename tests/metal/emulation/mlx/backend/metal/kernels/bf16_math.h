// The emulated library takes bfloat by itself.
#pragma once
