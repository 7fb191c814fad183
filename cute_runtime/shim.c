/* The one symbol of the full CuTe-DSL runtime (43 MB) that an exported kernel still names. */
#include <stdio.h>

void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message);

void CuteDSLRT_TVMFFISetRaisedCudaError(int code) {
    char message[64];
    snprintf(message, sizeof message, "CUDA error %d", code);
    TVMFFIErrorSetRaisedFromCStr("RuntimeError", message);
}
