// Units that multiply an activation by a weight and add the product to a sum, one product a clock.
//
//     unit            activation    weight                                         sum
//     mac_int8        int8          int8, -128 to 127                              26 bits
//     mac_int4        int8          int4, -8 to 7                                  22 bits
//     mac_uniform     int8          4-bit code of pot.py, grid="uniform": 0 to 7   21 bits
//     mac_pot         int8          4-bit code of pot.py: 0, 1, 2, 4, ..., 64      25 bits
//     mac_two         int8          4-bit code of pot.py, terms=2: 0 to 12         22 bits
//     mac_float16     float16       float16                                        float32
//     mac_bfloat16    bfloat16      bfloat16                                       float32
//
// A 4-bit code of pot.py is `sign << 3 | index`. Index 0 is zero with either sign.
// A sum is as wide as 1,024 products need, whatever they are. hardware.py derives the width from the weights' levels. It
// also synthesizes all units with sums of 32 bits, because many accelerators have them.
// With activations of -128: 1,024 * 128 * 64 = 2^23 for single powers, and +2^23 needs 25 bits.
//
// product_* gives product and carry, where activation * weight = product + carry. Negation is ~p + 1: the carry leaves
// the 1 to the adder of the sum, which has room for it.

module accumulator #(parameter N = 1, PRODUCT = 16, SUM = 26) (
  input clk, input clear, input [N*PRODUCT-1:0] products, input [N-1:0] carries, output reg signed [SUM-1:0] sum
);
  reg signed [SUM-1:0] next;
  integer i;
  always @* begin
    next = sum;
    for (i = 0; i < N; i = i + 1)
      next = next + $signed(products[i*PRODUCT +: PRODUCT]) + $signed({1'b0, carries[i]});
  end
  always @(posedge clk)
    if (clear) sum <= 0;
    else sum <= next;
endmodule

// -----------------------------------------------------------------------------
// Products of an int8 activation. Each is written in four forms, 0 to 3, so that none is large only for the way in which
// it is written. hardware.py synthesizes all four and reports the smallest. Forms 0 and 1 of the multipliers are the
// same text: Yosys builds a plain array for form 0 and recodes form 1 by Booth.

`ifndef FORM
`define FORM 0
`endif

// A digit of Booth's recoding: -2 * b[2] + b[1] + b[0] = -2 to 2, so a 4-bit weight needs two digits.
// digit * x = product + b[2].
module booth_digit (input signed [7:0] x, input [2:0] b, output signed [8:0] product);
  wire one = b[1] ^ b[0];
  wire two = b[2] ? ~(b[1] | b[0]) : b[1] & b[0];
  assign product = ({9{one}} & {x[7], x} | {9{two}} & {x, 1'b0}) ^ {9{b[2]}};
endmodule

module product_int8 (input signed [7:0] x, input signed [7:0] w, output signed [15:0] product, output carry);
  generate
    if (`FORM <= 1) begin
      assign product = x * w;
      assign carry = 0;
    end else if (`FORM == 2) begin  // four digits, each added to the bits that the ones before leave
      wire signed [8:0] p0, p1, p2, p3;
      booth_digit d0 (x, {w[1:0], 1'b0}, p0), d1 (x, w[3:1], p1), d2 (x, w[5:3], p2), d3 (x, w[7:5], p3);
      wire signed [9:0] s1 = (p0 >>> 2) + p1 + $signed({1'b0, w[3]});
      wire signed [9:0] s2 = (s1 >>> 2) + p2 + $signed({1'b0, w[5]});
      wire signed [9:0] s3 = (s2 >>> 2) + p3 + $signed({1'b0, w[7]});
      assign product = {s3, s2[1:0], s1[1:0], p0[1:0]};
      assign carry = w[1];
    end else begin  // eight shifted copies of x, the last one negative
      wire signed [8:0] s1 = (($signed(x & {8{w[0]}})) >>> 1) + $signed(x & {8{w[1]}});
      wire signed [8:0] s2 = (s1 >>> 1) + $signed(x & {8{w[2]}});
      wire signed [8:0] s3 = (s2 >>> 1) + $signed(x & {8{w[3]}});
      wire signed [8:0] s4 = (s3 >>> 1) + $signed(x & {8{w[4]}});
      wire signed [8:0] s5 = (s4 >>> 1) + $signed(x & {8{w[5]}});
      wire signed [8:0] s6 = (s5 >>> 1) + $signed(x & {8{w[6]}});
      wire signed [8:0] s7 = (s6 >>> 1) + $signed(~x & {8{w[7]}}) + $signed({1'b0, w[7]});
      assign product = {s7, s6[0], s5[0], s4[0], s3[0], s2[0], s1[0], x[0] & w[0]};
      assign carry = 0;
    end
  endgenerate
endmodule

module product_int4 (input signed [7:0] x, input signed [3:0] w, output signed [11:0] product, output carry);
  generate
    if (`FORM <= 1) begin
      assign product = x * w;
      assign carry = 0;
    end else if (`FORM == 2) begin  // two digits
      wire signed [8:0] p0, p1;
      booth_digit d0 (x, {w[1:0], 1'b0}, p0), d1 (x, w[3:1], p1);
      wire signed [9:0] s1 = (p0 >>> 2) + p1 + $signed({1'b0, w[3]});
      assign product = {s1, p0[1:0]};
      assign carry = w[1];
    end else begin  // four shifted copies of x, the last one negative
      wire signed [8:0] s1 = (($signed(x & {8{w[0]}})) >>> 1) + $signed(x & {8{w[1]}});
      wire signed [8:0] s2 = (s1 >>> 1) + $signed(x & {8{w[2]}});
      wire signed [8:0] s3 = (s2 >>> 1) + $signed(~x & {8{w[3]}}) + $signed({1'b0, w[3]});
      assign product = {s3, s2[0], s1[0], x[0] & w[0]};
      assign carry = 0;
    end
  endgenerate
endmodule

module product_uniform (input signed [7:0] x, input [3:0] w, output signed [10:0] product, output carry);
  wire sign = w[3];
  generate
    if (`FORM <= 1) begin
      wire signed [10:0] magnitude = x * $signed({1'b0, w[2:0]});
      assign product = magnitude ^ {11{sign}};
      assign carry = sign;
    end else if (`FORM == 2) begin  // two digits, negative for a negative sign
      wire signed [8:0] p0, p1;
      booth_digit d0 (x, {w[1:0], 1'b0} ^ {3{sign}}, p0), d1 (x, {1'b0, w[2:1]} ^ {3{sign}}, p1);
      wire signed [8:0] s1 = (p0 >>> 2) + p1 + $signed({1'b0, sign});
      assign product = {s1, p0[1:0]};
      assign carry = w[1] ^ sign;
    end else begin  // three shifted copies of x
      wire signed [8:0] s1 = (($signed(x & {8{w[0]}})) >>> 1) + $signed(x & {8{w[1]}});
      wire signed [8:0] s2 = (s1 >>> 1) + $signed(x & {8{w[2]}});
      assign product = {s2, s1[0], x[0] & w[0]} ^ {11{sign}};
      assign carry = sign;
    end
  endgenerate
endmodule

// x << (index - 1)
module product_pot (input signed [7:0] x, input [3:0] w, output signed [13:0] product, output carry);
  wire nonzero = |w[2:0];
  wire sign = w[3] & nonzero;
  wire [7:0] a = (x ^ {8{sign}}) & {8{nonzero}};  // the sign flips 8 bits, not 14: bits that a shift brings in are the sign
  assign carry = sign;
  generate
    if (`FORM == 0) begin  // Yosys' own shifter
      wire signed [13:0] magnitude = nonzero ? x <<< (w[2:0] - 3'd1) : 14'sd0;
      assign product = magnitude ^ {14{sign}};
    end else if (`FORM == 1) begin  // steps of -1 or 0, 2 and 4
      wire [8:0] b = w[0] ? {a, sign} : {a[7], a};
      wire [10:0] c = w[1] ? {b, {2{sign}}} : {{2{a[7]}}, b};
      wire [14:0] d = w[2] ? {c, {4{sign}}} : {{4{a[7]}}, c};
      assign product = d[14:1];
    end else if (`FORM == 2) begin  // the same steps, the largest first
      wire [11:0] b = w[2] ? {a, {4{sign}}} : {{4{a[7]}}, a};
      wire [13:0] c = w[1] ? {b, {2{sign}}} : {{2{a[7]}}, b};
      wire [14:0] d = w[0] ? {c, sign} : {a[7], c};
      assign product = d[14:1];
    end else begin  // one of seven
      wire signed [7:0] y = x ^ {8{w[3]}};
      wire [7:0] is = 8'd1 << w[2:0];
      assign product = {14{is[1]}} & {{6{y[7]}}, y} | {14{is[2]}} & {{5{y[7]}}, y, w[3]}
        | {14{is[3]}} & {{4{y[7]}}, y, {2{w[3]}}} | {14{is[4]}} & {{3{y[7]}}, y, {3{w[3]}}}
        | {14{is[5]}} & {{2{y[7]}}, y, {4{w[3]}}} | {14{is[6]}} & {y[7], y, {5{w[3]}}}
        | {14{is[7]}} & {y, {6{w[3]}}};
    end
  endgenerate
endmodule

// The code is FP4 E2M1: exponent w[2:1], mantissa w[0]. Its level is 0 or 1 at exponent 0, else (2 + mantissa) shifted
// left by exponent - 1.
module product_two (input signed [7:0] x, input [3:0] w, output signed [11:0] product, output carry);
  wire high = |w[2:1];
  wire sign = w[3] & (high | w[0]);
  wire [7:0] a = x ^ {8{sign}};
  assign carry = sign;
  generate
    if (`FORM == 0) begin  // two terms, 2x and x, added and then shifted
      wire signed [9:0] terms = $signed({x & {8{high}}, 1'b0}) + $signed(x & {8{w[0]}});
      wire signed [11:0] shifted = w[2:1] == 3 ? terms <<< 2 : w[2:1] == 2 ? terms <<< 1 : terms;
      assign product = shifted ^ {12{sign}};
    end else if (`FORM == 1) begin  // two terms, each shifted by itself, and then added
      wire signed [10:0] first = w[2:1] == 3 ? x <<< 3 : w[2:1] == 2 ? x <<< 2 : w[2:1] == 1 ? x <<< 1 : 0;
      wire signed [9:0] second = !w[0] ? 0 : w[2:1] == 3 ? x <<< 2 : w[2:1] == 2 ? x <<< 1 : x;
      wire signed [11:0] magnitude = first + second;
      assign product = magnitude ^ {12{sign}};
    end else if (`FORM == 2) begin  // 1 or 3 times x, and then a shift by 0 to 3
      wire three = high & w[0];
      wire signed [9:0] odd = $signed(a & {8{high | w[0]}}) + $signed({a, sign} & {9{three}})
        + $signed({1'b0, sign & three});
      wire [10:0] b = (w[0] ? w[2] & ~w[1] : w[1]) ? {odd, sign} : {odd[9], odd};
      wire [12:0] c = w[2] & (w[1] | ~w[0]) ? {b, {2{sign}}} : {{2{b[10]}}, b};
      assign product = c[11:0];
    end else begin  // form 0 with the sign at the 8 bits of x
      wire signed [9:0] terms = $signed({a, sign} & {9{high}}) + $signed(a & {8{w[0]}})
        + $signed({1'b0, sign & high & w[0]});
      wire [10:0] once = &w[2:1] ? {terms, sign} : {terms[9], terms};
      assign product = w[2] ? {once, sign} : {once[10], once};
    end
  endgenerate
endmodule

// -----------------------------------------------------------------------------
// Units with int8 activations. N: products a clock

module mac_int8 #(parameter N = 1, SUM = 26) (
  input clk, input clear, input [8*N-1:0] x, input [8*N-1:0] w, output signed [SUM-1:0] sum
);
  wire [16*N-1:0] products;
  wire [N-1:0] carries;
  product_int8 multiply [N-1:0] (x, w, products, carries);
  accumulator #(N, 16, SUM) add (clk, clear, products, carries, sum);
endmodule

module mac_int4 #(parameter N = 1, SUM = 22) (
  input clk, input clear, input [8*N-1:0] x, input [4*N-1:0] w, output signed [SUM-1:0] sum
);
  wire [12*N-1:0] products;
  wire [N-1:0] carries;
  product_int4 multiply [N-1:0] (x, w, products, carries);
  accumulator #(N, 12, SUM) add (clk, clear, products, carries, sum);
endmodule

module mac_uniform #(parameter N = 1, SUM = 21) (
  input clk, input clear, input [8*N-1:0] x, input [4*N-1:0] w, output signed [SUM-1:0] sum
);
  wire [11*N-1:0] products;
  wire [N-1:0] carries;
  product_uniform multiply [N-1:0] (x, w, products, carries);
  accumulator #(N, 11, SUM) add (clk, clear, products, carries, sum);
endmodule

module mac_pot #(parameter N = 1, SUM = 25) (
  input clk, input clear, input [8*N-1:0] x, input [4*N-1:0] w, output signed [SUM-1:0] sum
);
  wire [14*N-1:0] products;
  wire [N-1:0] carries;
  product_pot multiply [N-1:0] (x, w, products, carries);
  accumulator #(N, 14, SUM) add (clk, clear, products, carries, sum);
endmodule

module mac_two #(parameter N = 1, SUM = 22) (
  input clk, input clear, input [8*N-1:0] x, input [4*N-1:0] w, output signed [SUM-1:0] sum
);
  wire [12*N-1:0] products;
  wire [N-1:0] carries;
  product_two multiply [N-1:0] (x, w, products, carries);
  accumulator #(N, 12, SUM) add (clk, clear, products, carries, sum);
endmodule

// -----------------------------------------------------------------------------
// Units of floating-point numbers, for scale: an exact product, and a float32 sum rounded to nearest even. To keep them
// small, subnormal numbers count as zero, and infinities and NaN do not exist. A sum of float16 products cannot
// overflow float32; one of bfloat16 products can, and is then wrong.

// EXPONENT and MANTISSA: bits of the inputs. product is a float32 number.
module product_float #(parameter EXPONENT = 5, MANTISSA = 10) (
  input [EXPONENT+MANTISSA:0] x, input [EXPONENT+MANTISSA:0] w, output [31:0] product
);
  localparam BIAS = (1 << (EXPONENT - 1)) - 1;
  wire [EXPONENT-1:0] ex = x[EXPONENT+MANTISSA-1:MANTISSA], ew = w[EXPONENT+MANTISSA-1:MANTISSA];
  wire [2*MANTISSA+1:0] m = {1'b1, x[MANTISSA-1:0]} * {1'b1, w[MANTISSA-1:0]};
  wire carry = m[2*MANTISSA+1];  // the product of two significands is in [1, 4)
  wire [23:0] significand = {carry ? m : m << 1, {(22-2*MANTISSA){1'b0}}};
  wire signed [10:0] e = $signed({1'b0, ex}) + $signed({1'b0, ew}) + $signed({1'b0, carry}) + (127 - 2 * BIAS);
  wire zero = ex == 0 || ew == 0 || e <= 0;
  assign product = zero ? 32'b0 : {x[EXPONENT+MANTISSA] ^ w[EXPONENT+MANTISSA], e[7:0], significand[22:0]};
endmodule

module float32_add (input [31:0] a, input [31:0] b, output [31:0] total);
  wire swap = b[30:0] > a[30:0];
  wire [31:0] large = swap ? b : a, small = swap ? a : b;
  wire [7:0] distance = large[30:23] - small[30:23];
  wire [23:0] ml = {large[30:23] != 0, large[22:0]}, ms = small[30:23] == 0 ? 24'b0 : {1'b1, small[22:0]};
  // The smaller number, with two more bits and a third that tells whether any lower bit is set
  wire [49:0] wide = distance > 26 ? {49'b0, |ms} : {ms, 26'b0} >> distance[4:0];
  wire [26:0] aligned = {wide[49:24], |wide[23:0]};
  wire subtract = a[31] ^ b[31];
  wire [27:0] m = {1'b0, ml, 3'b0} + ({1'b0, aligned} ^ {28{subtract}}) + subtract;
  // Shift the leading 1 to the top
  wire z4 = m[27:12] == 0;
  wire [27:0] n4 = z4 ? m << 16 : m;
  wire z3 = n4[27:20] == 0;
  wire [27:0] n3 = z3 ? n4 << 8 : n4;
  wire z2 = n3[27:24] == 0;
  wire [27:0] n2 = z2 ? n3 << 4 : n3;
  wire z1 = n2[27:26] == 0;
  wire [27:0] n1 = z1 ? n2 << 2 : n2;
  wire z0 = n1[27] == 0;
  wire [27:0] n = z0 ? n1 << 1 : n1;
  wire signed [9:0] e = $signed({2'b0, large[30:23]}) + 1 - $signed({5'b0, z4, z3, z2, z1, z0});
  wire up = n[3] & (|n[2:0] | n[4]);
  wire [30:0] rounded = {e[7:0], n[26:4]} + up;
  assign total = !n[27] || e <= 0 ? 32'b0 : {large[31], rounded};
endmodule

module mac_float16 (input clk, input clear, input [15:0] x, input [15:0] w, output reg [31:0] sum);
  wire [31:0] product, total;
  product_float #(5, 10) multiply (x, w, product);
  float32_add add (sum, product, total);
  always @(posedge clk) if (clear) sum <= 0; else sum <= total;
endmodule

module mac_bfloat16 (input clk, input clear, input [15:0] x, input [15:0] w, output reg [31:0] sum);
  wire [31:0] product, total;
  product_float #(8, 7) multiply (x, w, product);
  float32_add add (sum, product, total);
  always @(posedge clk) if (clear) sum <= 0; else sum <= total;
endmodule
