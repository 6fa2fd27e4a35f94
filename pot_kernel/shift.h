// Products of power-of-two weights and 8-bit activations by shifts and additions alone, for processors without a
// multiplier. The header needs no library: it also compiles for a bare RV32I core, whose instructions have no
// multiplication (test_run.py looks at them).
//
//     clang --target=riscv32 -march=rv32i -ffreestanding -O2 -S -x c shift.h
//
// A level of the grid is a power of two, or the sum of two. So x * level is x shifted once, or twice and added.

#include <stdint.h>

struct PotShift {        // how to multiply by a level
    uint8_t first;       // places to shift for the first power
    uint8_t second;      // and for the second
    int8_t has_first;    // -1 (all bits): the level has a first power; 0: it is zero
    int8_t has_second;   // -1: it has a second one
    int32_t negative;    // -1: the level is below zero; 0: it is not
};

// Writes how to multiply by a level. Returns 0, or -1 if the level has more than two powers.
static inline int pot_shift_of(int32_t level, struct PotShift* out) {
    int32_t size = level < 0 ? -level : level;
    uint8_t places[2] = {0, 0}, count = 0, place = 0;
    for (; size; size >>= 1, place++)
        if (size & 1) {
            if (count == 2) return -1;
            places[count++] = place;
        }
    out->first = places[0], out->second = places[1];
    out->has_first = count > 0 ? -1 : 0, out->has_second = count > 1 ? -1 : 0;
    out->negative = level < 0 ? -1 : 0;
    return 0;
}

// x times a level.
static inline int32_t pot_shift(int32_t x, const struct PotShift* level) {
    const uint32_t bits = (uint32_t)x;  // shifting a negative number is defined only for unsigned types
    const uint32_t sum = (bits << level->first & (uint32_t)(int32_t)level->has_first) +
                         (bits << level->second & (uint32_t)(int32_t)level->has_second);
    return (int32_t)((sum ^ (uint32_t)level->negative) - (uint32_t)level->negative);
}

// sum plus the products of levels (n) and x (n). shifts: (256), of each level as an unsigned byte.
static inline int32_t pot_shift_dot(int32_t sum, const int8_t* levels, const int8_t* x, int n,
                                    const struct PotShift* shifts) {
    for (int i = 0; i < n; i++) sum += pot_shift(x[i], &shifts[(uint8_t)levels[i]]);
    return sum;
}
